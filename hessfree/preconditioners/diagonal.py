"""What the diagonal preconditioners share: squares of Jᵀu, averaged over updates, and the inverse of a diagonal."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from hessfree.preconditioners.base import Sample, State
from hessfree.preconditioners.refresh import AveragedRefresh
from hessfree.solvers import Map
from hessfree.vectors import ParameterVector


@dataclasses.dataclass(frozen=True, kw_only=True)
class Diagonal(AveragedRefresh):
    """M = (diag(d) + `damping_scale`·D)^power, with d averaged over updates."""

    @property
    def taps(self) -> tuple[type[nn.Module], ...]:
        """The types of modules whose inputs `update` needs: none."""
        return ()

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

    def averaged(
        self, state: State, sample: Sample, estimate: Callable[[], Tensor], step: int
    ) -> tuple[State, str | None]:
        """Return `state` with a new estimate averaged in.

        Over several ranks it is the mean of their estimates, each of its own batch: the products of two ranks' draws,
        which the square of a sum would hold, have no mean but a variance.

        Args:
            state: What was learned so far.
            sample: The network on the curvature batch.
            estimate: Returns a new estimate, `[P]`.
            step: Number of the step.

        Returns:
            The new state, and a warning where the estimate is not finite.
        """
        d = sample.ranks.mean(sample.ranks.guard(estimate))
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
