"""The damped Gauss-Newton step from the dual: an R×R Gram matrix in the place of the P×P one ("minSR")."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hessfree.operators import Root, SymmetricOperator
from hessfree.solvers.base import Map, Solution, Solver, Status

SMALLEST_RATIO = 16  # of the damping to the trace of G, in units of rounding: below it the sums are in float64


@dataclasses.dataclass(frozen=True)
class GramCholesky(Solver):
    """Solve (UᵀU + D) x = b in the space of the rows of U = BᵀJ `[R, P]`, where R = N·C and JᵀHJ = UᵀU.

    The push-through identity (Woodbury 1950) moves the inverse to the other side,

        (UᵀU + D)⁻¹ b = D⁻¹ (b − Uᵀ (I + U D⁻¹ Uᵀ)⁻¹ U D⁻¹ b),

    and holds for every b: the gradient, weight decay, a mean of gradients, momentum. The matrix U D⁻¹ Uᵀ `[R, R]` costs
    R² times the sum of the layers' widths, and its factor R³/3, in the place of R·P² + P³/3. This is stochastic
    reconfiguration in its "minSR" form (Chen & Heyl 2024; Rende et al. 2024), and natural gradient descent by the
    tangent kernel.

    Where D is small the identity subtracts two nearly equal vectors. The residual is therefore measured by a product
    with G itself, and as long as that helps, the same factor is applied to it once more (iterative refinement, Higham
    2002, ch. 12). Where D is below rounding of the trace of G, sums are made in float64 on devices that have it.

    Attributes:
        max_rows: Refuse more rows; 16 000 in float32 are 1 GB a matrix.
        momentum: μ of SPRING (Goldshlager, Abrahamsen & Lin 2024): the damping pulls x towards μ times the last
            solution rather than to zero, so that directions that this batch says nothing of keep what earlier ones
            said. (D then includes weight decay.) 0 does without; it must be below 1.
        refinements: At most so many steps of refinement.
    """

    max_rows: int = 16_000
    momentum: float = 0.0
    refinements: int = 3

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            ValueError: A setting is out of range.
        """
        if not (isinstance(self.max_rows, int) and self.max_rows > 0):
            raise ValueError(f"max_rows={self.max_rows!r} must be a positive integer")
        if not 0 <= self.momentum < 1:
            raise ValueError(
                f"momentum={self.momentum!r} is SPRING's factor on the last solution: choose 0 <= it < 1, for example "
                "0.9; from 1 on what no batch sees is never forgotten"
            )
        if not (isinstance(self.refinements, int) and self.refinements >= 0):
            raise ValueError(f"refinements={self.refinements!r} must be an integer, 0 or more")

    @property
    def uses_preconditioner(self) -> bool:
        """Whether `solve` looks at its preconditioner at all."""
        return False

    def solve(
        self,
        operator: SymmetricOperator,
        rhs: Tensor,
        shift: float | Tensor,
        precondition: Map | None = None,
        start: Tensor | None = None,
        memory: Mapping[str, Any] | None = None,
    ) -> Solution:
        """Solve (A + diag(shift)) x = rhs directly.

        Args:
            operator: A, `[P, P]`, which knows itself as UᵀU plus a diagonal.
            rhs: b, `[P]`.
            shift: The diagonal of D: a number, or `[P]`.
            precondition: Not used.
            start: Not used.
            memory: `Solution.memory` of the last call; None or empty at first.

        Returns:
            The solution; where D is not positive to rounding, that with the least multiple of it, or of the identity,
            added that is (`Status.SHIFTED`). With `momentum` it is that of SPRING's problem, and its residual is that
            of b all the same; where it would lead uphill, the momentum is left out.

        Raises:
            ValueError: U has more than `max_rows` rows, or the operator does not know itself as UᵀU plus a diagonal.
        """
        root, diagonal = operator.low_rank()
        self._check_rows(root)
        memory = memory or {}
        system = _system(root, diagonal + shift, memory.get("double", False))
        nothing = Solution(torch.zeros_like(rhs), rhs.clone(), Status.NON_FINITE, 0, (1.0,))
        if system is None or not bool(torch.isfinite(rhs).all()):
            return nothing
        pulls = [torch.zeros_like(rhs)]
        if self.momentum > 0 and "solution" in memory:
            pulls.insert(0, self.momentum * (shift * memory["solution"]))
        for times in (10.0**k for k in range(16)):
            factored = system.factor(times)
            for pull in pulls if factored is not None else ():
                assert factored is not None
                value, residual, norms = self._refined(operator, rhs + pull, shift, factored)
                if bool(torch.isfinite(value).all() & (rhs @ value >= 0)):
                    noted = {"double": system.wants_double} | ({"solution": value} if self.momentum > 0 else {})
                    return Solution(value, residual - pull, factored.status, len(norms) - 1, norms, noted)
        return nothing

    def _refined(
        self, operator: SymmetricOperator, rhs: Tensor, shift: float | Tensor, factored: _Factored
    ) -> tuple[Tensor, Tensor, tuple[float, ...]]:
        """Return the solution, its residual, and the relative norms of the residuals on the way."""
        scale = float(rhs.norm()) or 1.0

        def with_residual(x: Tensor) -> tuple[Tensor, Tensor, float]:
            r = rhs - operator.matvec(x) - shift * x
            return x, r, float(r.norm()) / scale

        value, residual, norm = with_residual(factored.solve(rhs))
        norms, enough = [1.0, norm], 4 * torch.finfo(rhs.dtype).eps
        while factored.status is Status.DIRECT and norms[-1] > enough and len(norms) - 2 < self.refinements:
            better, after, norm = with_residual(value + factored.solve(residual))
            if not norm < 0.5 * norms[-1]:
                break
            value, residual = better, after
            norms.append(norm)
        return value, residual, tuple(norms)

    def _check_rows(self, root: Root) -> None:
        if root.count > self.max_rows:
            gigabytes = 3 * root.count**2 * torch.finfo(root.dtype).bits / 8e9
            raise ValueError(
                f"the Gram matrix of {root.count} rows (samples times outputs) with its factor needs about "
                f"{gigabytes:.3g} GB, and max_rows is {self.max_rows}; give HessianFree a curvature_batch=, use "
                "solver=CG(), which never forms it, or raise max_rows"
            )


@dataclasses.dataclass(frozen=True, eq=False)
class _Factored:
    """The inverse of UᵀU + D by the factor of I + U D⁻¹ Uᵀ."""

    root: Root
    inverse: float | Tensor  # D⁻¹
    cholesky: Tensor
    status: Status

    def solve(self, b: Tensor) -> Tensor:
        """Return (UᵀU + D)⁻¹ b, summed in the root's precision and rounded to that of `b`."""
        scaled = b.to(self.root.dtype) * self.inverse
        y = torch.cholesky_solve(self.root.matvec(scaled).unsqueeze(1), self.cholesky).squeeze(1)
        return (scaled - self.inverse * self.root.rmatvec(y)).to(b.dtype)


@dataclasses.dataclass(frozen=True, eq=False)
class _System:
    """U, a positive D, and U D⁻¹ Uᵀ."""

    root: Root
    damping: float | Tensor
    gram: Tensor
    shifted: bool  # D is greater than was asked for
    wants_double: bool  # D is too small for sums in float32

    def factor(self, times: float) -> _Factored | None:
        """Factor with `times` the damping; None where Cholesky's method breaks down."""
        matrix = self.gram / times
        matrix.diagonal().add_(1)
        cholesky, failed = torch.linalg.cholesky_ex(matrix)
        if int(failed):
            return None
        status = Status.SHIFTED if self.shifted or times > 1 else Status.DIRECT
        return _Factored(self.root, 1 / (times * self.damping), cholesky, status)


def _system(root: Root, damping: float | Tensor, double: bool, shifted: bool = False) -> _System | None:
    """Form the Gram matrix, in float64 where D needs it; None where numbers are not finite."""
    wider = root.dtype != torch.float64 and root.device.type != "mps"
    if double and wider:
        return _system(root.to(torch.float64), damping, double, shifted)
    if isinstance(damping, Tensor):
        damping = damping.to(root.dtype)
    least = float(damping.min()) if isinstance(damping, Tensor) else damping
    if not least > 0:
        trace = float(root.gram().diagonal().sum())
        more = 10 * torch.finfo(root.dtype).eps * (trace or 1.0) - least
        return _system(root, damping + more, double, True) if math.isfinite(more) else None
    gram = root.gram(1 / damping) if isinstance(damping, Tensor) else root.gram().div_(damping)
    trace = float(gram.diagonal().sum())
    wants_double = trace * SMALLEST_RATIO * torch.finfo(torch.float32).eps > 1
    if not math.isfinite(trace):
        return None
    if wants_double and wider:
        return _system(root, damping, True, shifted)
    return _System(root, damping, gram, shifted, wants_double)
