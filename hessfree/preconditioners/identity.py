"""No preconditioner."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from torch import nn

from hessfree.preconditioners.base import Preconditioner, Sample, State
from hessfree.solvers import Map
from hessfree.vectors import ParameterVector


@dataclasses.dataclass(frozen=True)
class Identity(Preconditioner):
    """M = I: plain conjugate gradients."""

    @property
    def taps(self) -> tuple[type[nn.Module], ...]:
        """The types of modules whose inputs `update` needs: none."""
        return ()

    def due(self, state: State, step: int) -> bool:
        """Return False: there is nothing to learn."""
        return False

    def update(self, state: State, sample: Sample, step: int) -> tuple[State, str | None]:
        """Return `state`."""
        return state, None

    def inverse(self, state: State, parameters: ParameterVector, scale: float, shifts: Sequence[float]) -> Map | None:
        """Return None, the identity."""
        return None

    def describe(self, state: State) -> str:
        """Return what a report says of it."""
        return "none"
