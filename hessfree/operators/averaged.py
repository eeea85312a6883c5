"""The mean over ranks of an operator that each rank has for its own batch."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from hessfree.distributed import Ranks
from hessfree.operators.base import LowRank, SymmetricOperator


class Averaged(SymmetricOperator):
    """G = mean of the ranks' G_r, by one reduction a product.

    A rank whose own product fails sends NaN, which all ranks then see, and its error with the next status.
    """

    def __init__(self, operator: SymmetricOperator, ranks: Ranks) -> None:
        """Describe the mean.

        Args:
            operator: G_r, of this rank.
            ranks: The ranks.
        """
        self.size, self.dtype, self.device = operator.size, operator.dtype, operator.device
        self._operator, self._ranks = operator, ranks

    def matvec(self, v: Tensor) -> Tensor:
        """Return G v `[P]` for the same `v` on all ranks; one message of P numbers."""
        return self._mean(lambda: self._operator.matvec(v), v, v.shape)

    def quadratic_form(self, vectors: Tensor) -> Tensor:
        """Return V G Vᵀ `[K, K]`; one message of K² numbers."""
        count = len(vectors)
        return self._mean(lambda: self._operator.quadratic_form(vectors), vectors, (count, count))

    def low_rank(self) -> LowRank:
        """Refuse: the rows of U lie on several ranks.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            f"the Gram matrix of {self._ranks.size} ranks is not formed; use solver=CG(), which averages "
            "products, or DenseCholesky(), which averages the P×P matrix"
        )

    def to_dense(self) -> Tensor:
        """Return the matrix `[P, P]`, formed by each rank from its own batch; one message of P² numbers."""
        return self._ranks.mean(self._ranks.guard(self._operator.to_dense))

    def diagonal(self) -> Tensor:
        """Return the exact diagonal `[P]`; one message of P numbers."""
        return self._ranks.mean(self._ranks.guard(self._operator.diagonal))

    def _mean(self, local: Callable[[], Tensor], like: Tensor, shape: tuple[int, ...]) -> Tensor:
        try:
            found = local()
        except Exception as error:
            self._ranks.hold(error)
            found = like.new_full(shape, float("nan"))
        return self._ranks.mean(found)
