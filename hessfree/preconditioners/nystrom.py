"""A randomised low-rank approximation of the curvature (Frangella, Tropp & Udell 2021, Algorithms 2.1 and 5.1)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hessfree.linearization import GraphLinearization
from hessfree.operators import Averaged, GaussNewton, SymmetricOperator
from hessfree.preconditioners.base import Sample, State
from hessfree.preconditioners.refresh import Refresh, check_count
from hessfree.solvers import Map
from hessfree.vectors import ParameterVector


@dataclasses.dataclass(frozen=True, kw_only=True)
class Nystrom(Refresh):
    """M = U Λ Uᵀ + λ_r (I − U Uᵀ) + μI from `rank` products of G with random directions.

    μ is the mean of D. An update costs `rank` products, and the state `rank` vectors `[P]`.

    Attributes:
        rank: Directions.
        update_every: Steps between updates.
        warmup_updates: So many updates, the first ones, are made at every step.
    """

    rank: int = 50
    update_every: int = 20
    warmup_updates: int = 1

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            ValueError: A setting is out of range.
        """
        super().__post_init__()
        check_count(self, "rank")

    @property
    def taps(self) -> tuple[type[nn.Module], ...]:
        """The types of modules whose inputs `update` needs: none."""
        return ()

    def update(self, state: State, sample: Sample, step: int) -> tuple[State, str | None]:
        """Approximate G of `sample`.

        Args:
            state: What was learned so far; empty at first. Not changed.
            sample: The network on the curvature batch.
            step: Number of the step.

        Returns:
            The new state, and a warning where G has no such approximation (negative curvature, not finite).
        """
        network = GraphLinearization(sample.outputs, sample.parameters)
        operator: SymmetricOperator = GaussNewton(network, sample.hessian, sample.parameters)
        if sample.ranks.size > 1:
            operator = Averaged(operator, sample.ranks)
        rank = min(self.rank, operator.size)
        generator = torch.Generator(operator.device).manual_seed(sample.seed)
        drawn = torch.randn(operator.size, rank, generator=generator, dtype=operator.dtype, device=operator.device)
        test, _ = torch.linalg.qr(drawn)
        product = operator @ test
        # a shift of the size of rounding makes the core safely positive definite; it is taken off again below
        shift = torch.finfo(operator.dtype).eps * product.norm()
        product = product + shift * test
        core, failed = torch.linalg.cholesky_ex(test.T @ product)
        if int(failed) or not bool(torch.isfinite(core).all()):
            return state, "G has no Nystrom approximation (it is not positive, or not finite); the old one is kept"
        basis, values, _ = torch.linalg.svd(
            torch.linalg.solve_triangular(core, product.T, upper=False).T, full_matrices=False
        )
        values = (values.square() - shift).clamp_min(0)
        return {"updates": state.get("updates", 0) + 1, "step": step, "basis": basis, "values": values}, None

    def inverse(self, state: State, parameters: ParameterVector, scale: float, shifts: Sequence[float]) -> Map | None:
        """Return r ↦ U (kΛ + μ)⁻¹ Uᵀ r + (kλ_r + μ)⁻¹ (I − U Uᵀ) r.

        Args:
            state: What was learned.
            parameters: The parameters.
            scale: k.
            shifts: The diagonal of D, one number a parameter.

        Returns:
            The map on `[P]` vectors.
        """
        if not state:
            return None
        mean = math.fsum(s * n for s, n in zip(shifts, parameters.numels, strict=True)) / parameters.size
        basis, damped = state["basis"], scale * state["values"] + mean
        precision = torch.finfo(damped.dtype)
        damped = damped.clamp_min(float(damped.max()) * precision.eps + precision.tiny)
        rest = 1 / damped[-1]
        along = 1 / damped - rest

        def apply(r: Tensor) -> Tensor:
            return rest * r + basis @ (along * (basis.T @ r))

        return apply

    def describe(self, state: State) -> str:
        """Return what a report says of it."""
        return f"Nystrom of rank {state['values'].numel()}" if state else "none yet"
