"""What a linearisation is: the Jacobian J of the network's outputs z in the parameters, by products."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from hessfree.vectors import FlatSpace


class LinearizationError(RuntimeError):
    """A back end cannot linearise this network; the message says why."""


class Linearization(Protocol):
    """Products with J at one value of the parameters, reused by every iteration of a solver.

    Attributes:
        name: Which back end this is.
        space: The flat space `[Z]` of the outputs.
        outputs: z, flat `[Z]`, without graph.
    """

    name: str
    space: FlatSpace
    outputs: Tensor

    def jvp(self, v: Tensor) -> Tensor:
        """Return J v `[Z]` for `v` `[P]`."""
        ...

    def vjp(self, u: Tensor) -> Tensor:
        """Return Jᵀ u `[P]` for `u` `[Z]`."""
        ...

    def vjps(self, u: Tensor) -> Tensor:
        """Return Jᵀ applied to each row of `u` `[K, Z]`, as `[K, P]`."""
        ...
