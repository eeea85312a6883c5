"""The damped Gauss-Newton step from the matrix itself: the dense-Fisher baseline."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hessfree.operators import SymmetricOperator
from hessfree.solvers.base import Map, Solution, Solver, Status


@dataclasses.dataclass(frozen=True)
class DenseCholesky(Solver):
    """Form the P×P matrix, factor it, solve: N·C·P² + P³/3 operations and P² numbers of memory.

    Attributes:
        max_parameters: Refuse larger matrices; 20 000 parameters in float32 are 1.6 GB a copy.
    """

    max_parameters: int = 20_000

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            ValueError: A setting is out of range.
        """
        if not (isinstance(self.max_parameters, int) and self.max_parameters > 0):
            raise ValueError(f"max_parameters={self.max_parameters!r} must be a positive integer")

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
            operator: A, `[P, P]`.
            rhs: b, `[P]`.
            shift: The diagonal of D: a number, or `[P]`.
            precondition: Not used.
            start: Not used.
            memory: Not used.

        Returns:
            The solution; where the matrix is not positive definite to rounding, that with the least
            multiple of the identity added, by factors of ten, that makes it so (`Status.SHIFTED`).

        Raises:
            ValueError: P is greater than `max_parameters`.
        """
        p = operator.size
        if p > self.max_parameters:
            gigabytes = 3 * p * p * torch.finfo(operator.dtype).bits / 8e9
            raise ValueError(
                f"a dense {p}x{p} matrix with its factor needs about {gigabytes:.3g} GB, and max_parameters is "
                f"{self.max_parameters}; use solver=CG(), which never forms it, or raise max_parameters"
            )
        dense = operator.to_dense()  # ours to change
        dense.diagonal().add_(shift)
        found = _solve(dense, rhs) if bool(torch.isfinite(dense).all()) else None
        if found is None:
            return Solution(torch.zeros_like(rhs), rhs.clone(), Status.NON_FINITE, 0, (1.0,))
        value, residual, added = found
        norms = torch.stack([rhs.norm(), residual.norm()]).tolist()
        status = Status.SHIFTED if added > 0 else Status.DIRECT
        return Solution(value, residual, status, 1, (1.0, norms[1] / (norms[0] or 1.0)))


def _solve(dense: Tensor, rhs: Tensor) -> tuple[Tensor, Tensor, float] | None:
    """Solve with `dense` (which is changed) plus the least multiple of I that makes it positive definite.

    Args:
        dense: The symmetric matrix, finite.
        rhs: The right-hand side.

    Returns:
        The solution, its residual in the matrix as it was given, and the multiple; None where the numbers
        break down with any.
    """
    precision = torch.finfo(dense.dtype)
    # a multiple that matters to no entry of the matrix, then factors of ten until it matters more than all
    jitter = precision.eps * (float(dense.diagonal().abs().max()) or 1.0)
    added = 0.0
    for more in (0.0, *(jitter * 10**k for k in range(30))):
        dense.diagonal().add_(more)
        added += more
        factor, failed = torch.linalg.cholesky_ex(dense)
        if int(failed):
            continue
        value = torch.cholesky_solve(rhs[:, None], factor)[:, 0]
        residual = rhs - dense @ value + added * value
        # a factor of a matrix singular to rounding can succeed, and still lead uphill: m(x) > m(0) = 0
        if float(value @ (rhs + residual)) >= 0:
            return value, residual, added
    return None
