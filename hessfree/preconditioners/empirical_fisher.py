"""Martens' preconditioner: the diagonal of the empirical Fisher matrix to the power ¾ (2010, sec. 4.7)."""

from __future__ import annotations

import dataclasses
import math

from hessfree.preconditioners.base import Sample, State
from hessfree.preconditioners.cotangents import signs
from hessfree.preconditioners.diagonal import Diagonal, squares


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmpiricalFisherDiagonal(Diagonal):
    """M = (diag(Σ_n ∇L_n ∇L_nᵀ) + D)^power, with ∇L_n the gradient of sample n's part of the loss, times √N.

    The sum of squared sample gradients is estimated without bias by one backward pass: the square of their sum
    with a random sign each.
    """

    power: float = 0.75

    def update(self, state: State, sample: Sample, step: int) -> tuple[State, str | None]:
        """Estimate the diagonal on `sample` and average it into the state.

        Args:
            state: What was learned so far; empty at first. Not changed.
            sample: The network on the curvature batch.
            step: Number of the step.

        Returns:
            The new state, and a warning where it is not finite.
        """
        space = sample.hessian.space
        u = space.flatten(sample.gradients) * signs(sample, sample.generator()) * math.sqrt(sample.mean_over)
        return self.averaged(state, sample, lambda: squares(sample, [u]), step)

    def describe(self, state: State) -> str:
        """Return what a report says of it."""
        return f"diagonal of the empirical Fisher matrix to the power {self.power:g}" if state else "none yet"
