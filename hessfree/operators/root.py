"""A square root of the Gauss-Newton matrix: U = BᵀJ with UᵀU = JᵀHJ, by products, and its Gram matrix U D Uᵀ."""

from __future__ import annotations

import abc
from collections.abc import Iterator

import torch
from torch import Tensor

from hessfree.linearization import Linearization
from hessfree.losses import Form
from hessfree.matmul import gram, matmul
from hessfree.operators.base import LinearOperator
from hessfree.operators.rows import at_once, unit_rows


class Root(LinearOperator):
    """U `[R, P]`, the rows in an order of the root's own.

    Attributes:
        dtype: Dtype of its vectors.
        device: Device of its vectors.
        count: R.
        size: P.
        order: For each row, its place in the flat outputs `[Z]`; None where they are the same.
        words: In words, what is held of U.
    """

    count: int
    size: int
    order: Tensor | None = None
    words: str

    @property
    def shape(self) -> tuple[int, int]:
        """(R, P)."""
        return self.count, self.size

    @abc.abstractmethod
    def gram(self, weights: float | Tensor = 1.0) -> Tensor:
        """Return U diag(w) Uᵀ.

        Args:
            weights: w: a number, or `[P]`.

        Returns:
            `[R, R]`, of which the lower triangle and the diagonal count.
        """

    @abc.abstractmethod
    def to(self, dtype: torch.dtype) -> Root:
        """Return U in another precision: what is held is rounded or not, products take and give `dtype`."""

    def scaled(self, factor: float) -> Root:
        """Return `factor` times U."""
        return self if factor == 1 else _ScaledRoot(self, factor)


class ProductRoot(Root):
    """BᵀJ by products with J and with B, of which nothing is held."""

    words = "products"

    def __init__(self, linearization: Linearization, size: int, form: Form | None = None) -> None:
        """Compose the root.

        Args:
            linearization: J.
            size: P.
            form: H = B Bᵀ; None for B the identity.
        """
        self.linearization, self.form = linearization, form
        self.count, self.size = linearization.space.size, size
        self.dtype, self.device = linearization.space.dtype, linearization.space.device

    def matvec(self, v: Tensor) -> Tensor:
        """Return BᵀJ v `[Z]` for `v` `[P]`."""
        jv = self.linearization.jvp(v)
        return jv if self.form is None else self.form.transposed_root(jv)

    def rmatvec(self, u: Tensor) -> Tensor:
        """Return JᵀB u `[P]` for `u` `[Z]`."""
        return self.linearization.vjp(u if self.form is None else self.form.root(u))

    def rows(self) -> Iterator[Tensor]:
        """Yield the rows in order, in chunks `[r, P]` of bounded size."""
        for units in unit_rows(self.linearization.space, self.size):
            roots = units if self.form is None else torch.stack([self.form.root(unit) for unit in units])
            yield self.linearization.vjps(roots)

    def gram(self, weights: float | Tensor = 1.0) -> Tensor:
        """Return U diag(w) Uᵀ `[Z, Z]` (see `Root.gram`).

        The rows are formed a bounded number at a time. They meet all rows at once where these are few enough to be
        held, else products with U.

        Args:
            weights: w: a number, or `[P]`.

        Returns:
            The matrix, all of it.
        """
        if self.count > at_once(self.size):
            return self.times(self, weights)
        rows = torch.cat(list(self.rows()))
        return matmul(rows * weights, rows.mT) if isinstance(weights, Tensor) else gram(rows.mT) * weights

    def times(self, other: ProductRoot, weights: float | Tensor = 1.0) -> Tensor:
        """Return U diag(w) Vᵀ `[Z1, Z2]` for another root V of the same parameters.

        Args:
            other: V.
            weights: w: a number, or `[P]`.

        Returns:
            The matrix.
        """
        held = torch.cat(list(self.rows())) if self.count <= at_once(self.size) else None
        columns = []
        for rows in other.rows():
            weighted = rows * weights
            if held is None:
                columns.append(torch.stack([self.matvec(row) for row in weighted], 1))
            else:
                columns.append(held @ weighted.T)
        return torch.cat(columns, 1)

    def to(self, dtype: torch.dtype) -> Root:
        """Return U with products that take and give `dtype`; they are no more exact than before."""
        return self if dtype == self.dtype else _CastRoot(self, dtype)


class _CastRoot(Root):
    """Products of another root in another precision, and sums of its rows' products in this one."""

    def __init__(self, root: ProductRoot, dtype: torch.dtype) -> None:
        self._root, self.dtype, self.device = root, dtype, root.device
        self.count, self.size, self.words = root.count, root.size, root.words

    def matvec(self, v: Tensor) -> Tensor:
        return self._root.matvec(v.to(self._root.dtype)).to(self.dtype)

    def rmatvec(self, u: Tensor) -> Tensor:
        return self._root.rmatvec(u.to(self._root.dtype)).to(self.dtype)

    def gram(self, weights: float | Tensor = 1.0) -> Tensor:
        out = torch.zeros(self.count, self.count, dtype=self.dtype, device=self.device)
        first = 0
        for rows in self._root.rows():
            left, second = (rows.to(self.dtype) * weights), 0
            for others in self._root.rows():
                block = left @ others.to(self.dtype).T
                out[first : first + len(rows), second : second + len(others)] = block
                second += len(others)
                if second >= first + len(rows):
                    break  # the lower triangle is there
            first += len(rows)
        return out

    def to(self, dtype: torch.dtype) -> Root:
        return self._root.to(dtype)


class _ScaledRoot(Root):
    def __init__(self, root: Root, factor: float) -> None:
        self._root, self._factor = root, factor
        self.dtype, self.device, self.count, self.size = root.dtype, root.device, root.count, root.size
        self.order, self.words = root.order, root.words

    def matvec(self, v: Tensor) -> Tensor:
        return self._factor * self._root.matvec(v)

    def rmatvec(self, u: Tensor) -> Tensor:
        return self._factor * self._root.rmatvec(u)

    def gram(self, weights: float | Tensor = 1.0) -> Tensor:
        return self._root.gram(weights).mul_(self._factor**2)

    def to(self, dtype: torch.dtype) -> Root:
        return _ScaledRoot(self._root.to(dtype), self._factor)
