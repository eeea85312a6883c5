"""Preconditioned conjugate gradients (Hestenes & Stiefel 1952), stopped as Hessian-free optimization wants it.

To solve (A + D) x = b is to minimise m(x) = ½ xᵀ(A + D)x − bᵀx. Its negative gradient is the residual
r = b − (A + D)x. Each iteration goes along a direction p to the lowest point of m on that line, and then
turns the next residual into a direction that is conjugate to all before it (pᵀ(A + D)p' = 0), so that no
later iteration undoes what this one gained. A preconditioner M ≈ A + D replaces r by z = M⁻¹r.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from hessfree.operators import SymmetricOperator
from hessfree.solvers.base import Map, Solution, Solver, Status
from hessfree.solvers.forcing import Forcing
from hessfree.solvers.iterations import Row, Run


@dataclasses.dataclass(frozen=True)
class CG(Solver):
    """Conjugate gradients by products alone.

    Attributes:
        max_iterations: At most so many products; 0 gives the preconditioned right-hand side itself (with
            K-FAC: a K-FAC step), of the length that the preconditioner gives it, and takes no product at all.
        tolerance: Stop when ‖r‖/‖b‖ falls below it; None never does. A `Forcing` (`EisenstatWalker()`) chooses
            it anew at every solve.
        progress: Stop when the relative progress of the quadratic model over the last k = max(10, i/10)
            iterations falls below k times it (Martens 2010, sec. 4.4); None never does; "auto" is 5e-4, or
            None where `tolerance` is given.
        warm_start: Start from so many times the last solution (Martens 2010, sec. 4.5; 0.95 in Martens & Sutskever
            2012), or from zero where that is better; 0 always starts from zero. Costs one more product.
        replace_residual: Compute the residual as b − (A + D)x, one more product each time, where its recurrence has
            drifted from it (van der Vorst & Ye 2000): x then gets as accurate as the products are. For long solves
            from far starts in low precision; an accelerator is waited for at every iteration.
        every: Iterate at every so many solves only. Between them the solution is α z with the step length α that
            the last iteration found along its own z = M⁻¹b, and takes no product. Nothing has seen the curvature
            there, so it is no longer than the last iteration's, in the norm of M. Needs `max_iterations=1`.
    """

    max_iterations: int = 250
    tolerance: float | Forcing | None = None
    progress: float | Literal["auto"] | None = "auto"
    warm_start: float = 0.0
    replace_residual: bool = False
    every: int = 1

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            ValueError: A setting is out of range, or does not go with another.
        """
        if not (isinstance(self.max_iterations, int) and self.max_iterations >= 0):
            raise ValueError(f"max_iterations={self.max_iterations!r} must be an integer, 0 or more")
        if isinstance(self.tolerance, int | float):
            if not 0 <= self.tolerance < 1:
                raise ValueError(f"tolerance={self.tolerance!r} is relative to the right-hand side: choose 0 <= it < 1")
        elif self.tolerance is not None and (
            isinstance(self.tolerance, type) or not callable(getattr(self.tolerance, "tolerance", None))
        ):
            raise ValueError(
                f"tolerance={self.tolerance!r} has no method tolerance(); pass a number, None, or an object such as "
                "hessfree.EisenstatWalker()"
            )
        chosen = self.progress is None or self.progress == "auto"
        if not chosen and not (isinstance(self.progress, float) and 0 < self.progress < 1):
            raise ValueError(f"progress={self.progress!r} must be a number between 0 and 1, 'auto' or None")
        if not 0 <= self.warm_start <= 1:
            raise ValueError(
                f"warm_start={self.warm_start!r} is a factor on the last solution: choose 0 <= it <= 1, "
                "for example 0.95"
            )
        if not isinstance(self.replace_residual, bool):
            raise ValueError(
                f"replace_residual={self.replace_residual!r} must be True or False: when to replace is found by itself"
            )
        if not (isinstance(self.every, int) and self.every >= 1):
            raise ValueError(f"every={self.every!r} must be an integer, 1 or more")
        if self.every > 1 and (self.max_iterations != 1 or self.warm_start > 0):
            raise ValueError(
                f"every={self.every!r} reuses the one step length of a solve of one iteration from zero, but "
                f"max_iterations={self.max_iterations!r} and warm_start={self.warm_start!r}: "
                "choose max_iterations=1 and warm_start=0, or every=1"
            )

    @property
    def works_on_shards(self) -> bool:
        """Whether `solve` needs of its vectors only sums, and inner products by the operator."""
        return self.warm_start == 0 and not self.replace_residual

    @property
    def uses_preconditioner(self) -> bool:
        """Whether `solve` looks at its preconditioner at all."""
        return True

    def solve(
        self,
        operator: SymmetricOperator,
        rhs: Tensor,
        shift: float | Tensor,
        precondition: Map | None = None,
        start: Tensor | None = None,
        memory: Mapping[str, Any] | None = None,
    ) -> Solution:
        """Solve (A + diag(shift)) x = rhs, never returning anything worse than the start.

        Args:
            operator: A, `[P, P]`.
            rhs: b, `[P]`.
            shift: The diagonal of D: a number, or `[P]`.
            precondition: Multiplies by an approximation of (A + D)⁻¹, symmetric and positive definite.
            start: First iterate, `[P]`; None starts from `memory` (see `warm_start`), or zero.
            memory: `Solution.memory` of the last call; None or empty at first.

        Returns:
            The solution. On an accelerator the host waits once, at the end, unless a stopping rule
            needs a number at every iteration.
        """
        memory = memory or {}
        if self.every > 1 and memory.get("reused", self.every) < self.every - 1:
            return self._reused(operator, rhs, precondition, memory)
        warm = start is None and self.warm_start > 0 and "solution" in memory
        if warm:
            start = self.warm_start * memory["solution"]
        run = Run(operator, rhs, shift, precondition, start, warm, self.replace_residual)
        if self.max_iterations == 0:
            solution, noted = _preconditioned(operator, run), dict[str, Any]()
        else:
            stop, noted = self._stop(operator, rhs, memory)
            rows = self._iterate(run, stop, self._waits(rhs))
            solution = _conclude(run, rows, stop)
            if self.every > 1 and rows[-1].length > 0 and solution.status in {Status.ITERATIONS, Status.CONVERGED}:
                noted |= {"length": rows[-1].length, "decrease": -rows[-1].model, "reused": 0}
        if self.warm_start > 0:
            noted["solution"] = solution.value
        return dataclasses.replace(solution, memory=noted)

    def _iterate(self, run: Run, stop: _Stop, waits: bool) -> list[Row]:
        history, read = [run.row()], list[Row]()
        while len(history) <= self.max_iterations:
            if waits:
                read.append(Row(*history[-1].tolist()))
                if stop.verdict(read) is not None:
                    break
            run.advance()
            history.append(run.row())
        return [Row(*row) for row in torch.stack(history).tolist()]

    def _reused(
        self, operator: SymmetricOperator, rhs: Tensor, precondition: Map | None, memory: Mapping[str, Any]
    ) -> Solution:
        """Return the preconditioned right-hand side at the step length of an earlier solve."""
        z = rhs if precondition is None else precondition(rhs)
        length = memory["length"]
        # m falls by ½ bᵀx along a line on which the length is right
        (slope,) = operator.dots((rhs, z))
        shorter = (2 * memory["decrease"] / (length * slope).abs()).clamp_max(1).sqrt()
        noted = {**memory, "reused": memory["reused"] + 1}
        return dataclasses.replace(_direct(operator, shorter * length * z, rhs, Status.REUSED), memory=noted)

    def _waits(self, rhs: Tensor) -> bool:
        """Tell whether to look at every iteration's numbers at once; a run that stopped inside changes no more."""
        return rhs.device.type == "cpu" or self.tolerance is not None or self._progress is not None

    @property
    def _progress(self) -> float | None:
        if self.progress != "auto":
            return self.progress
        # the rule looks back ten iterations, so a shorter run never asks it
        return 5e-4 if self.tolerance is None and self.max_iterations > 10 else None

    def _stop(
        self, operator: SymmetricOperator, rhs: Tensor, memory: Mapping[str, Any]
    ) -> tuple[_Stop, dict[str, Any]]:
        """Return the rules of this solve, and what they leave for the next."""
        if self.tolerance is None or isinstance(self.tolerance, int | float):
            return _Stop(self.tolerance, self._progress), {}
        norm = operator.norm(rhs)
        tolerance = self.tolerance.tolerance(norm, memory.get("norm"), memory.get("tolerance"))
        return _Stop(tolerance, self._progress), {"norm": norm, "tolerance": tolerance}


@dataclasses.dataclass(frozen=True)
class _Stop:
    """When to stop."""

    tolerance: float | None
    progress: float | None

    def verdict(self, rows: Sequence[Row]) -> Status | None:
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
        if self.progress is not None and i > k and last.model < 0:
            if (last.model - rows[i - k].model) / last.model < k * self.progress:
                return Status.PROGRESS
        return None


def _conclude(run: Run, rows: Sequence[Row], stop: _Stop) -> Solution:
    verdicts = (stop.verdict(rows[: i + 1]) for i in range(len(rows)))
    i, status = next(((i, v) for i, v in enumerate(verdicts) if v is not None), (len(rows) - 1, Status.ITERATIONS))
    residuals = tuple(math.sqrt(row.square) for row in rows[: i + 1])
    if rows[i].model <= rows[0].model or i == 0:
        return Solution(run.x.contiguous(), run.r, status, i, residuals)
    status = status if status is Status.NON_FINITE else Status.NO_BETTER
    return Solution(*run.start, status, i, residuals)


def _preconditioned(operator: SymmetricOperator, run: Run) -> Solution:
    """Return the start plus z."""
    found = _direct(operator, run.x + run.p, run.r, Status.PRECONDITIONER)
    return dataclasses.replace(found, value=run.x.contiguous()) if found.failed else found


def _direct(operator: SymmetricOperator, x: Tensor, rhs: Tensor, status: Status) -> Solution:
    """Return a solution of which no product is known; zero where it is not finite."""
    if operator.finite(x):
        return Solution(x, None, status, 0, ())
    return Solution(torch.zeros_like(rhs), None, Status.NON_FINITE, 0, ())
