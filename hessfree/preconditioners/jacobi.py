"""Jacobi: the diagonal of the Gauss-Newton matrix."""

from __future__ import annotations

import dataclasses
from typing import Literal

from hessfree.linearization import GraphLinearization
from hessfree.operators import GaussNewton
from hessfree.preconditioners.base import Sample, State
from hessfree.preconditioners.cotangents import cotangents
from hessfree.preconditioners.diagonal import Diagonal, squares


@dataclasses.dataclass(frozen=True, kw_only=True)
class Jacobi(Diagonal):
    """M = diag(G) + D.

    Attributes:
        method: "sampled": (Jᵀu)² with one u of E[u uᵀ] = H an update, whose mean is diag(G) (Hutchinson's estimator
            for a matrix with a root; Bekas et al. 2007). "exact": from every row of J; for small networks.
    """

    method: Literal["sampled", "exact"] = "sampled"

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            ValueError: A setting is out of range.
        """
        super().__post_init__()
        if self.method not in {"sampled", "exact"}:
            raise ValueError(f"method={self.method!r} must be 'sampled' or 'exact'")

    def update(self, state: State, sample: Sample, step: int) -> tuple[State, str | None]:
        """Estimate diag(G) on `sample` and average it into the state.

        Args:
            state: What was learned so far; empty at first. Not changed.
            sample: The network on the curvature batch.
            step: Number of the step.

        Returns:
            The new state, and a warning where H has no root to sample from.
        """
        if self.method == "exact":
            network = GraphLinearization(sample.outputs, sample.parameters)
            operator = GaussNewton(network, sample.hessian, sample.parameters)
            return self.averaged(state, sample, lambda: operator.diagonal().clamp_min_(0), step)
        drawn, warning = cotangents(sample, "sampled")
        state, trouble = self.averaged(state, sample, lambda: squares(sample, drawn), step)
        return state, trouble or warning

    def describe(self, state: State) -> str:
        """Return what a report says of it."""
        return f"Jacobi ({self.method})" if state else "none yet"
