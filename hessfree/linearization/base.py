"""What a linearisation is: the Jacobian J of the network's outputs z in the parameters, by products."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from hessfree.vectors import FlatSpace


class LinearizationError(RuntimeError):
    """A back end cannot linearise this network; the message says why."""


def in_words(error: Exception) -> str:
    """Return the kind of `error` and the first line of what it says."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


class Linearization(Protocol):
    """Products with J at one value of the parameters, reused by every iteration of a solver.

    Attributes:
        name: Which back end this is.
        stands_alone: Whether products use neither an autograd graph nor the network.
        space: The flat space `[Z]` of the outputs.
    """

    name: str
    stands_alone: bool
    space: FlatSpace

    @property
    def outputs(self) -> Tensor:
        """The outputs z, flat `[Z]`, without graph."""
        ...

    def jvp(self, v: Tensor) -> Tensor:
        """Return J v `[Z]` for `v` `[P]`."""
        ...

    def vjp(self, u: Tensor) -> Tensor:
        """Return Jᵀ u `[P]` for `u` `[Z]`."""
        ...

    def gauss_newton(self, v: Tensor, h: Tensor | float) -> Tensor:
        """Return Jᵀ(h · J v) `[P]` for `v` `[P]` and a number or a diagonal `h` `[Z]`."""
        ...

    def vjps(self, u: Tensor) -> Tensor:
        """Return Jᵀ applied to each row of `u` `[K, Z]`, as `[K, P]`."""
        ...
