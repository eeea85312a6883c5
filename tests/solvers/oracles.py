"""Matrices that are known entry by entry, seen through their products."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hessfree.operators import LinearOperator


class DenseOperator(LinearOperator):
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
