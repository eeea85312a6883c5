"""Preconditioned conjugate gradients (Hestenes & Stiefel 1952), stopped as Hessian-free optimization wants it.

To solve (A + D) x = b is to minimise m(x) = ½ xᵀ(A + D)x − bᵀx. Its negative gradient is the residual
r = b − (A + D)x. Each iteration goes along a direction p to the lowest point of m on that line, and then
turns the next residual into a direction that is conjugate to all before it (pᵀ(A + D)p' = 0), so that no
later iteration undoes what this one gained. A preconditioner M ≈ A + D replaces r by z = M⁻¹r.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from hessfree.operators import LinearOperator
from hessfree.solvers.base import Map, Solution, Status


@dataclasses.dataclass(frozen=True)
class CG:
    """Conjugate gradients by products alone.

    Attributes:
        max_iterations: At most so many products; 0 gives the preconditioned right-hand side itself (with
            K-FAC: a K-FAC step), of the length that the preconditioner gives it.
        tolerance: Stop when ‖r‖/‖b‖ falls below it; None never does.
        progress: Stop when the relative progress of the quadratic model over the last k = max(10, i/10)
            iterations falls below k times it (Martens 2010, sec. 4.4); None never does; "auto" is 5e-4, or
            None where `tolerance` is given.
    """

    max_iterations: int = 250
    tolerance: float | None = None
    progress: float | Literal["auto"] | None = "auto"

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            ValueError: A setting is out of range.
        """
        if not (isinstance(self.max_iterations, int) and self.max_iterations >= 0):
            raise ValueError(f"max_iterations={self.max_iterations!r} must be an integer, 0 or more")
        if self.tolerance is not None and not 0 <= self.tolerance < 1:
            raise ValueError(f"tolerance={self.tolerance!r} is relative to the right-hand side: choose 0 <= it < 1")
        chosen = self.progress is None or self.progress == "auto"
        if not chosen and not (isinstance(self.progress, float) and 0 < self.progress < 1):
            raise ValueError(f"progress={self.progress!r} must be a number between 0 and 1, 'auto' or None")

    @property
    def uses_preconditioner(self) -> bool:
        """Whether `solve` looks at its preconditioner at all."""
        return True

    def solve(
        self,
        operator: LinearOperator,
        rhs: Tensor,
        shift: float | Tensor,
        precondition: Map | None = None,
        start: Tensor | None = None,
    ) -> Solution:
        """Solve (A + diag(shift)) x = rhs, never returning anything worse than the start.

        Args:
            operator: A, `[P, P]`.
            rhs: b, `[P]`.
            shift: The diagonal of D: a number, or `[P]`.
            precondition: Multiplies by an approximation of (A + D)⁻¹, symmetric and positive definite.
            start: First iterate, `[P]`; zero if None.

        Returns:
            The solution. On an accelerator the host waits once, at the end, unless a stopping rule
            needs a number at every iteration.
        """
        run = _Run(operator, rhs, shift, precondition, start)
        if self.max_iterations == 0:
            return run.preconditioned()
        waits = self._waits(rhs)
        history, read = [run.row()], list[_Row]()
        while len(history) <= self.max_iterations:
            if waits:
                read.append(_Row(*history[-1].tolist()))
                if self._verdict(read) is not None:
                    break
            run.advance()
            history.append(run.row())
        return self._conclude(run, [_Row(*row) for row in torch.stack(history).tolist()])

    def _waits(self, rhs: Tensor) -> bool:
        """Tell whether to look at every iteration's numbers at once; a run that stopped inside changes no more."""
        return rhs.device.type == "cpu" or self.tolerance is not None or self._progress is not None

    @property
    def _progress(self) -> float | None:
        if self.progress != "auto":
            return self.progress
        # the rule looks back ten iterations, so a shorter run never asks it
        return 5e-4 if self.tolerance is None and self.max_iterations > 10 else None

    def _verdict(self, rows: Sequence[_Row]) -> Status | None:
        """Return why to stop after the last of `rows`, or None to go on."""
        last, i = rows[-1], len(rows) - 1
        if last.square == 0 or (self.tolerance is not None and last.square <= self.tolerance**2):
            return Status.CONVERGED
        if not last.finite:
            return Status.NON_FINITE
        if not last.positive:
            return Status.NEGATIVE_CURVATURE
        if not last.definite:
            return Status.INDEFINITE
        k = max(10, i // 10)
        if self._progress is not None and i > k and last.model < 0:
            if (last.model - rows[i - k].model) / last.model < k * self._progress:
                return Status.PROGRESS
        return None

    def _conclude(self, run: _Run, rows: list[_Row]) -> Solution:
        verdicts = (self._verdict(rows[: i + 1]) for i in range(len(rows)))
        i, status = next(((i, v) for i, v in enumerate(verdicts) if v is not None), (len(rows) - 1, Status.ITERATIONS))
        residuals = tuple(math.sqrt(row.square) for row in rows[: i + 1])
        if rows[i].model <= rows[0].model or i == 0:
            return Solution(run.x, run.r, status, i, residuals)
        status = status if status is Status.NON_FINITE else Status.NO_BETTER
        return Solution(*run.start, status, i, residuals)


class _Row(NamedTuple):
    """The numbers of one iteration that decide anything. The last three are 1 or 0."""

    square: float  # ‖r‖² / ‖b‖²
    model: float  # m(x)
    finite: float  # no NaN or infinity has been met
    positive: float  # the curvature along the direction taken was positive
    definite: float  # the preconditioner is positive along the residual


class _Run:
    """The vectors of one run. Nothing here makes the host wait for an accelerator."""

    def __init__(
        self,
        operator: LinearOperator,
        rhs: Tensor,
        shift: float | Tensor,
        precondition: Map | None,
        start: Tensor | None,
    ) -> None:
        self._operator, self._rhs, self._shift = operator, rhs, shift
        self._precondition: Map = precondition if precondition is not None else lambda r: r
        self.x = torch.zeros_like(rhs) if start is None else start.clone()
        self.r = rhs.clone() if start is None else rhs - self._product(start)
        self.start = (self.x, self.r)
        square = rhs @ rhs
        self._scale = torch.where(square > 0, square, 1)
        self._model = -0.5 * (self.x @ (self.r + rhs))
        self._p = self._precondition(self.r)
        self._rz = self.r @ self._p
        self._finite = torch.isfinite(self._rz) & torch.isfinite(self._model)
        self._positive = torch.ones_like(self._finite)
        self._definite = self._rz > 0
        self._alive = self._finite & self._definite
        self._first = True

    def advance(self) -> None:
        """Take one iteration. Once one could not be taken in full, nothing changes any more."""
        q = self._product(self._p)
        curvature = self._p @ q
        self._positive = curvature > 0
        # To the minimum of m on the line; pᵀr is rᵀz but for rounding, and never climbs in spite of it. Along
        # non-positive curvature m has no minimum: only a first direction is taken, at its own length.
        length = torch.where(self._positive, (self._p @ self.r) / curvature, 1.0 if self._first else 0.0)
        self._first = False
        x, r = torch.addcmul(self.x, self._p, length), torch.addcmul(self.r, q, -length)  # x + αp and r − αq
        model = -0.5 * (x @ (r + self._rhs))
        moves = self._alive & torch.isfinite(model)  # a NaN or an infinity anywhere makes m one
        self.x, self.r = torch.where(moves, x, self.x), torch.where(moves, r, self.r)
        self._model = torch.where(moves, model, self._model)
        z = self._precondition(self.r)
        rz = self.r @ z
        self._finite, self._definite = moves & torch.isfinite(rz), rz > 0
        self._alive = self._finite & self._positive & self._definite
        self._p = torch.where(self._alive, torch.addcmul(z, self._p, rz / self._rz), self._p)
        self._rz = rz

    def row(self) -> Tensor:
        """Return the numbers of `_Row`."""
        numbers = (self.r @ self.r / self._scale, self._model)
        return torch.stack([*numbers, *(t.to(self.r.dtype) for t in (self._finite, self._positive, self._definite))])

    def preconditioned(self) -> Solution:
        """Return the start plus z, with the residual that it leaves."""
        x = self.x + self._p
        r = self._rhs - self._product(x)
        residual = float((r @ r / self._scale).sqrt())
        if math.isfinite(residual):
            return Solution(x, r, Status.PRECONDITIONER, 0, (residual,))
        return Solution(*self.start, Status.NON_FINITE, 0, (residual,))

    def _product(self, v: Tensor) -> Tensor:
        return self._operator.matvec(v) + self._shift * v
