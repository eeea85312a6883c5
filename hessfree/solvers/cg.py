"""Preconditioned conjugate gradients (Hestenes & Stiefel 1952), stopped as Hessian-free optimization wants it."""

from __future__ import annotations

import dataclasses
import math
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
            K-FAC: a K-FAC step).
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
        if self.progress not in {"auto", None} and not (isinstance(self.progress, float) and 0 < self.progress < 1):
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
        if self.max_iterations == 0:
            return _preconditioned(operator, rhs, shift, precondition, start)
        run = _Run(operator, rhs, shift, precondition, start)
        square = float(rhs @ rhs) if self.tolerance is not None else 0.0
        waits = rhs.device.type == "cpu" or self.tolerance is not None or self._progress is not None
        rows: list[_Row] = []
        history = [run.row()]
        for _ in range(self.max_iterations):
            run.advance()
            history.append(run.row())
            if waits:
                rows = rows or [_Row(*history[0].tolist())]
                rows.append(_Row(*history[-1].tolist()))
                if self._verdict(rows, square) is not None:
                    break
        if not waits:
            rows = [_Row(*row) for row in torch.stack(history).tolist()]
        return self._conclude(run, rows, square, rhs, start)

    @property
    def _progress(self) -> float | None:
        if self.progress != "auto":
            return self.progress
        # the rule looks back ten iterations, so a shorter run never asks it
        return 5e-4 if self.tolerance is None and self.max_iterations > 10 else None

    def _verdict(self, rows: list[_Row], square: float) -> Status | None:
        """Return why to stop after the last of `rows`, or None to go on; `square` is ‖b‖²."""
        last, i = rows[-1], len(rows) - 1
        if last.square == 0 or (self.tolerance is not None and last.square <= self.tolerance**2 * square):
            return Status.CONVERGED
        if last.negative:
            return Status.NEGATIVE_CURVATURE
        if not last.alive:
            return Status.NON_FINITE
        k = max(10, i // 10)
        if self._progress is not None and i > k and last.model < 0:
            if (last.model - rows[-1 - k].model) / last.model < k * self._progress:
                return Status.PROGRESS
        return None

    def _conclude(self, run: _Run, rows: list[_Row], square: float, rhs: Tensor, start: Tensor | None) -> Solution:
        iterations = next((i for i, row in enumerate(rows) if not row.alive), len(rows)) - 1
        status = self._verdict(rows[: iterations + 2], square) or Status.ITERATIONS
        scale = float(rhs.norm()) or 1.0
        residuals = tuple(math.sqrt(max(row.square, 0.0)) / scale for row in rows[: max(iterations, 0) + 1])
        value, residual = run.x, run.r
        if rows[-1].model > rows[0].model and status is not Status.NON_FINITE:
            status = Status.NO_BETTER
            value = torch.zeros_like(rhs) if start is None else start
            residual = run.first_residual
        return Solution(value, residual, status, max(iterations, 0), residuals)


class _Row(NamedTuple):
    """The numbers of one iteration that decide anything."""

    square: float  # ‖r‖²
    model: float  # m(x)
    alive: float  # 1 while every number so far was finite and every curvature positive
    negative: float  # 1 from the first direction of non-positive curvature on


class _Run:
    """The vectors of one run. Nothing here makes the host wait for an accelerator."""

    def __init__(
        self, operator: LinearOperator, rhs: Tensor, shift: float | Tensor, precondition: Map | None, start: Tensor | None
    ) -> None:
        self._operator, self._rhs, self._shift, self._precondition = operator, rhs, shift, precondition
        self.x = torch.zeros_like(rhs) if start is None else start.clone()
        self.r = rhs if start is None else rhs - operator.matvec(self.x) - shift * self.x
        self.first_residual = self.r
        self._at_zero = start is None
        z = self._preconditioned()
        self._p, self._rz = z, self.r @ z
        self._alive = torch.isfinite(self._rz) & (self._rz >= 0)
        self._negative = torch.zeros_like(self._alive)

    def advance(self) -> None:
        q = self._operator.matvec(self._p) + self._shift * self._p
        curvature = self._p @ q
        self._negative = self._alive & (curvature <= 0)
        self._alive = self._alive & (curvature > 0) & torch.isfinite(curvature)
        # a number that failed must not reach x or r, and the host need not know yet
        alpha = torch.where(self._alive, self._rz / curvature, 0)
        self.r = torch.where(self._alive, self.r - alpha * q, self.r)
        if self._at_zero:  # x = 0 would be no step at all: the first direction, at its own length, is a descent
            self.r = torch.where(self._negative, self.r - q, self.r)
            alpha = torch.where(self._negative, 1, alpha)
            self._at_zero = False
        self.x.addcmul_(self._p, alpha)
        z = self._preconditioned()
        rz = self.r @ z
        self._alive = self._alive & torch.isfinite(rz) & (rz >= 0)
        self._p = torch.where(self._alive, z + (rz / self._rz) * self._p, self._p)
        self._rz = torch.where(self._alive, rz, self._rz)

    def row(self) -> Tensor:
        model = -0.5 * (self.x @ (self.r + self._rhs))
        flags = (self._alive.to(model.dtype), self._negative.to(model.dtype))
        return torch.stack([self.r @ self.r, model, *flags])

    def _preconditioned(self) -> Tensor:
        return self.r.clone() if self._precondition is None else self._precondition(self.r)


def _preconditioned(
    operator: LinearOperator, rhs: Tensor, shift: float | Tensor, precondition: Map | None, start: Tensor | None
) -> Solution:
    """Return the preconditioner times the right-hand side, with the residual that it leaves."""
    value = rhs.clone() if precondition is None else precondition(rhs)
    residual = rhs - operator.matvec(value) - shift * value
    norms = torch.stack([rhs.norm(), residual.norm()]).tolist()
    status = Status.PRECONDITIONER if math.isfinite(norms[1]) else Status.NON_FINITE
    return Solution(value, residual, status, 0, (norms[1] / (norms[0] or 1.0),))
