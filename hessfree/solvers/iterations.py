"""The vectors of one run of conjugate gradients, and the numbers of each iteration that decide anything."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hessfree.operators import SymmetricOperator
from hessfree.solvers.base import Map
from hessfree.solvers.drift import Drift


class Row(NamedTuple):
    """The numbers of one iteration. `finite`, `positive` and `definite` are 1 or 0."""

    square: float  # ‖r‖² / ‖b‖²
    model: float  # m(x)
    finite: float  # no NaN or infinity has been met
    positive: float  # the curvature along the direction taken was positive
    definite: float  # the preconditioner is positive along the residual
    length: float  # how far the iteration went along its direction


class Run:
    """Iterations from a start. Nothing here makes the host wait for an accelerator unless residuals are replaced.

    Attributes:
        x: The iterate, `[P]`; to be read only.
        r: Its residual b − (A + D)x, `[P]`.
        p: The direction of the next iteration, `[P]`; that of the first is the preconditioned residual of the start.
    """

    def __init__(
        self,
        operator: SymmetricOperator,
        rhs: Tensor,
        shift: float | Tensor,
        precondition: Map | None,
        start: Tensor | None,
        below_zero: bool = False,
        replaces: bool = False,
    ) -> None:
        """Prepare the first iteration.

        Args:
            operator: A, `[P, P]`.
            rhs: b, `[P]`.
            shift: The diagonal of D: a number, or `[P]`.
            precondition: Multiplies by an approximation of (A + D)⁻¹.
            start: First iterate, `[P]`; zero if None.
            below_zero: Begin at zero where m(start) > m(0) = 0.
            replaces: Compute the residual anew where the recurrence drifts, which makes the host wait.
        """
        self._operator, self._rhs, self._shift = operator, rhs, shift
        self._precondition: Map = precondition if precondition is not None else lambda r: r
        zero = rhs.new_zeros(())
        self.x = zero.expand_as(rhs) if start is None else start.clone()  # a zero that takes no memory
        self.r = rhs if start is None else rhs - self._product(start)
        self._dots = operator.dots
        (square,) = self._dots((rhs, rhs))
        self._model = zero if start is None else self._value(self.x, self.r)
        if start is not None and below_zero:
            keep = self._model <= 0  # neither a NaN
            self.x, self.r = torch.where(keep, self.x, 0), torch.where(keep, self.r, rhs)
            self._model = torch.where(keep, self._model, 0)
        self._start = None if start is None else (self.x, self.r)  # else zero and b, which need no memory
        self._scale = torch.where(square > 0, square, 1)
        self.p = self._precondition(self.r)
        self._rz, self._rr = self._dots((self.r, self.p), (self.r, self.r))
        self._finite = torch.isfinite(self._rz) & torch.isfinite(self._model)
        self._positive = torch.ones_like(self._finite)
        self._definite = self._rz > 0
        self._alive = self._finite & self._definite
        self._length = torch.zeros_like(self._rz)
        self._first = True
        self._drift = Drift(self.x, self.r) if replaces else None

    @property
    def start(self) -> tuple[Tensor, Tensor]:
        """The first x and r."""
        return self._start or (torch.zeros_like(self._rhs), self._rhs.clone())

    def advance(self) -> None:
        """Take one iteration. Once one could not be taken in full, nothing changes any more."""
        q = self._product(self.p)
        curvature, slope = self._dots((self.p, q), (self.p, self.r))
        self._positive = curvature > 0
        # To the minimum of m on the line; pᵀr is rᵀz but for rounding, and never climbs in spite of it. Along
        # non-positive curvature m has no minimum: only a first direction is taken, at its own length.
        length = torch.where(self._positive, slope / curvature, 1.0 if self._first else 0.0)
        self._length, self._first = length, False
        # what this iteration has made is written over: each vector may be larger than the rest of the step
        x = torch.addcmul(self.x, self.p, length) if self._drift is None else self._drift.moved(self.p, q, length)
        r = torch.addcmul(self.r, q, -length, out=q)  # r − αq
        if self._drift is not None and self._drift.due(x, self.r, r):
            r = self._rhs - self._product(x)
            self._drift.replaced(x, r)
        model = self._value(x, r)
        moves = self._alive & torch.isfinite(model)  # a NaN or an infinity anywhere makes m one
        self.x, self.r = torch.where(moves, x, self.x, out=x), torch.where(moves, r, self.r, out=r)
        del x, r, q
        self._model = torch.where(moves, model, self._model)
        z = self._precondition(self.r)
        rz, self._rr = self._dots((self.r, z), (self.r, self.r))
        self._finite, self._definite = moves & torch.isfinite(rz), rz > 0
        self._alive = self._finite & self._positive & self._definite
        turned = torch.addcmul(z, self.p, rz / self._rz)
        self.p = torch.where(self._alive, turned, self.p, out=turned)
        self._rz = rz

    def row(self) -> Tensor:
        """Return the numbers of `Row`."""
        flags = (t.to(self.r.dtype) for t in (self._finite, self._positive, self._definite))
        return torch.stack([self._rr / self._scale, self._model, *flags, self._length])

    def _product(self, v: Tensor) -> Tensor:
        """Return (A + D) v, a new vector."""
        product = self._operator.matvec(v)
        if isinstance(self._shift, Tensor):
            return torch.addcmul(product, self._shift, v)
        return torch.add(product, v, alpha=self._shift)

    def _value(self, x: Tensor, r: Tensor) -> Tensor:
        """Return m(x) = −½ xᵀ(r + b)."""
        along_r, along_b = self._dots((x, r), (x, self._rhs))
        return -0.5 * (along_r + along_b)
