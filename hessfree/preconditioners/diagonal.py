"""What the diagonal preconditioners share: squares of Jᵀu, averaged over updates, and the inverse of a diagonal."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from hessfree.preconditioners.base import Sample, State
from hessfree.solvers import Map
from hessfree.vectors import ParameterVector


@dataclasses.dataclass(frozen=True)
class Diagonal:
    """M = (diag(d) + `damping_scale`·D)^power, with d averaged over updates.

    Attributes:
        update_every: Update d every so many steps (and at each of the first three).
        decay: Of the exponential moving average of d; a plain mean at first.
        damping_scale: Factor on the damping.
        power: Of the diagonal.
    """

    update_every: int = 5
    decay: float = 0.95
    damping_scale: float = 1.0
    power: float = 1.0

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            ValueError: A setting is out of range.
        """
        if not (isinstance(self.update_every, int) and self.update_every >= 1):
            raise ValueError(f"update_every={self.update_every!r} must be an integer, 1 or more")
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay={self.decay!r} must satisfy 0 <= decay < 1")
        if not 0 < self.damping_scale < math.inf:
            raise ValueError(f"damping_scale={self.damping_scale!r} must be positive and finite")
        if not 0 < self.power <= 1:
            raise ValueError(f"power={self.power!r} must satisfy 0 < power <= 1")

    @property
    def taps(self) -> tuple[type[nn.Module], ...]:
        """The types of modules whose inputs `update` needs: none."""
        return ()

    def due(self, state: State, step: int) -> bool:
        """Tell whether d is to be updated at step number `step`."""
        return not state or state["updates"] < 3 or step - state["step"] >= self.update_every

    def inverse(self, state: State, parameters: ParameterVector, scale: float, shifts: Sequence[float]) -> Map | None:
        """Return r ↦ (k·diag(d) + damping_scale·D)^(−power) r.

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
        damped = scale * state["diagonal"] + self.damping_scale * parameters.uniform_or_vector(shifts)
        precision = torch.finfo(damped.dtype)
        # without damping a parameter of no curvature is as good as the rounding of the largest
        inverse = damped.clamp_min(float(damped.max()) * precision.eps + precision.tiny) ** -self.power
        return lambda r: inverse * r

    def averaged(self, state: State, d: Tensor, step: int) -> tuple[State, str | None]:
        """Return `state` with `d` averaged in.

        Args:
            state: What was learned so far.
            d: A new estimate, `[P]`.
            step: Number of the step.

        Returns:
            The new state, and a warning where `d` is not finite.
        """
        if not bool(torch.isfinite(d).all()):
            return state, "the diagonal of the curvature is not finite; the preconditioner keeps the one it had"
        updates = state.get("updates", 0) + 1
        if state:
            d = torch.lerp(d, state["diagonal"], min(1 - 1 / updates, self.decay))
        return {"updates": updates, "step": step, "diagonal": d}, None


def squares(sample: Sample, cotangents: Iterable[Tensor]) -> Tensor:
    """Return Σ_u (Jᵀu)², entry by entry.

    Args:
        sample: The network on the curvature batch.
        cotangents: The u, `[Z]`.

    Returns:
        `[P]`.
    """
    total = sample.parameters.zeros()
    for u in cotangents:
        found = torch.autograd.grad(
            [o.edge for o in sample.outputs],
            sample.parameters.params,
            sample.hessian.space.split(u),
            retain_graph=True,
            allow_unused=True,
        )
        total += sample.parameters.flatten(found).square_()
    return total
