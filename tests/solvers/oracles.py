"""Matrices that are known entry by entry, seen through their products."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hessfree.operators import SymmetricOperator
from hessfree.solvers import CG, Map, Solution

SIZE = 40
SPECTRA = {
    "even": torch.linspace(1, 3, SIZE, dtype=torch.float64),
    "decades": torch.logspace(-3, 1, SIZE, dtype=torch.float64),
    "clusters": torch.tensor([1.0, 10.0, 100.0, 1000.0], dtype=torch.float64).repeat(SIZE // 4),
    "rank 5": torch.cat([torch.arange(1.0, 6.0, dtype=torch.float64), torch.zeros(SIZE - 5, dtype=torch.float64)]),
}
EXACT = CG(max_iterations=2000, tolerance=1e-12)


class DenseOperator(SymmetricOperator):
    """A matrix that is there, with a count of its products and a hook on each of them."""

    def __init__(self, matrix: Tensor, change: Callable[[int, Tensor], Tensor] | None = None) -> None:
        self.matrix = matrix
        self.size, self.dtype, self.device = matrix.shape[0], matrix.dtype, matrix.device
        self.products = 0
        self._change = change

    def matvec(self, v: Tensor) -> Tensor:
        self.products += 1
        product = self.matrix @ v
        return product if self._change is None else self._change(self.products, product)


def rotation(size: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0].to(dtype)


def symmetric(spectrum: Tensor, seed: int) -> Tensor:
    """Return a matrix of this spectrum in random directions."""
    basis = rotation(len(spectrum), seed)
    matrix = basis @ torch.diag(spectrum.double()) @ basis.T
    return (0.5 * (matrix + matrix.T)).to(spectrum.dtype)


def vector(size: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def model_value(matrix: Tensor, rhs: Tensor, shift: float | Tensor, x: Tensor) -> float:
    """Return m(x) = ½ xᵀ(A + D)x − bᵀx in double precision."""
    matrix, rhs, x = matrix.double(), rhs.double(), x.double()
    return float(0.5 * x @ (matrix @ x + shift * x) - rhs @ x)


def jacobi(matrix: Tensor, shift: float | Tensor) -> Map:
    inverse = 1 / (matrix.diagonal() + shift)
    return lambda r: r * inverse


def check(solution: Solution, matrix: Tensor, rhs: Tensor, shift: float | Tensor) -> None:
    """What holds for every solution: finite, its residual is its residual, the lists fit."""
    assert bool(torch.isfinite(solution.value).all())
    if solution.residual is None:
        assert (solution.residuals, solution.iterations) == ((), 0)
        return
    expected = rhs - matrix @ solution.value - shift * solution.value
    assert float((solution.residual - expected).norm()) <= 1e-9 * float(rhs.norm() + expected.norm() + 1)
    assert len(solution.residuals) == solution.iterations + 1
    assert abs(solution.residuals[-1] - float(expected.norm() / rhs.norm())) <= 1e-9 * max(1, solution.residuals[-1])
