"""The damped Gauss-Newton step from the matrix itself: the dense-Fisher baseline."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from hessfree.operators import LinearOperator
from hessfree.solvers.base import Map, Solution, Status


@dataclasses.dataclass(frozen=True)
class DenseCholesky:
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
        operator: LinearOperator,
        rhs: Tensor,
        shift: float | Tensor,
        precondition: Map | None = None,
        start: Tensor | None = None,
    ) -> Solution:
        """Solve (A + diag(shift)) x = rhs directly.

        Args:
            operator: A, `[P, P]`.
            rhs: b, `[P]`.
            shift: The diagonal of D: a number, or `[P]`.
            precondition: Not used.
            start: Not used.

        Returns:
            The solution; where the matrix is not positive definite to rounding, that of the smallest
            multiple of the identity added, by factors of ten, that makes it so.

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
        dense = operator.to_dense()
        dense.diagonal().add_(shift)
        factor, failed = torch.linalg.cholesky_ex(dense)
        if not bool(torch.isfinite(dense).all()):
            return Solution(torch.zeros_like(rhs), rhs.clone(), Status.NON_FINITE, 0, (1.0,))
        jitter = torch.finfo(dense.dtype).eps * float(dense.diagonal().abs().max())
        while int(failed):
            dense.diagonal().add_(jitter)
            factor, failed = torch.linalg.cholesky_ex(dense)
            jitter *= 10
        value = torch.cholesky_solve(rhs[:, None], factor)[:, 0]
        residual = rhs - dense @ value
        norms = torch.stack([rhs.norm(), residual.norm()]).tolist()
        return Solution(value, residual, Status.DIRECT, 1, (1.0, norms[1] / (norms[0] or 1.0)))
