"""A matrix that is set up by its first product, and by none if there is none."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from hessfree.operators.base import LowRank, SymmetricOperator
from hessfree.operators.work import Work
from hessfree.vectors import FlatSpace


class Deferred(SymmetricOperator):
    """The operator that `build` returns, which is first called when something multiplies by it."""

    def __init__(
        self,
        space: FlatSpace,
        build: Callable[[], SymmetricOperator],
        prepare: Callable[[], object] = lambda: None,
    ) -> None:
        """Describe the operator.

        Args:
            space: Of its vectors.
            build: Returns the operator; called at every product, so it remembers what it has set up.
            prepare: Called before each product: what only other forms of the operator need may be freed there.
        """
        self.size, self.dtype, self.device = space.size, space.dtype, space.device
        self._build, self._prepare = build, prepare

    def matvec(self, v: Tensor) -> Tensor:
        """Return A v `[P]`."""
        self._prepare()
        return self._build().matvec(v)

    def quadratic_form(self, vectors: Tensor) -> Tensor:
        """Return V A Vᵀ `[K, K]`, as the operator itself finds it."""
        return self._build().quadratic_form(vectors)

    def to_dense(self) -> Tensor:
        """Return the matrix `[P, P]`, as the operator itself forms it."""
        return self._build().to_dense()

    def work(self) -> Work:
        """Return what the forms take, as the operator itself counts it."""
        return self._build().work()

    def low_rank(self) -> LowRank:
        """Return UᵀU + diag(d), as the operator itself knows it."""
        return self._build().low_rank()

    def diagonal(self) -> Tensor:
        """Return the exact diagonal `[P]`, as the operator itself forms it."""
        return self._build().diagonal()
