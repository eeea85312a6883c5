"""The mean over ranks of an operator, for vectors of which each rank holds one part."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from hessfree.distributed import Ranks, Shards
from hessfree.operators.base import SymmetricOperator


class Sharded(SymmetricOperator):
    """G = mean of the ranks' G_r, of which a product gathers the direction and scatters the result.

    Each product sends what one reduction of P numbers does, in two halves, and leaves P / ranks numbers a rank. The
    vectors' inner products are sums over ranks.

    Attributes:
        shards: How vectors are divided.
    """

    def __init__(self, like: SymmetricOperator, ranks: Ranks, build: Callable[[], SymmetricOperator]) -> None:
        """Describe the operator.

        Args:
            like: An operator on whole vectors.
            ranks: The ranks.
            build: Returns this rank's operator; called at every product.
        """
        self.shards = Shards(like.size, ranks)
        self.size, self.dtype, self.device = self.shards.each, like.dtype, like.device
        self._ranks, self._build = ranks, build

    def matvec(self, v: Tensor) -> Tensor:
        """Return this rank's part of G v, for its part of v."""
        whole = self.shards.whole(v)
        operator = self._build()  # on all ranks or on none
        try:
            found = operator.matvec(whole)
        except Exception as error:
            self._ranks.hold(error)
            found = whole.new_full(whole.shape, float("nan"))
        return self.shards.scattered_mean(found)

    def dots(self, *pairs: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        """Return aᵀb of each pair of vectors, over all ranks."""
        return self.shards.dots(*pairs)

    def norm(self, vector: Tensor) -> float:
        """Return the Euclidean norm of a vector over all ranks."""
        return float(self.dots((vector, vector))[0].sqrt())

    def finite(self, vector: Tensor) -> bool:
        """Tell whether all numbers of all parts of a vector are finite."""
        return self.shards.finite(vector)
