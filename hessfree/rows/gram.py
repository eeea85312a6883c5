"""Gram matrices of rows that are whole, or outer products s aᵀ of which only the factors are held."""

from __future__ import annotations

from torch import Tensor

STRIP = 256  # rows of a Gram matrix that are made at once


def add_gram(
    gram: Tensor,
    left: Tensor,
    right: Tensor,
    inner: tuple[Tensor, Tensor] | None = None,
    bias: float = 0.0,
    lower: bool = True,
) -> None:
    """Add L Rᵀ to `gram`, or (L Rᵀ) ∘ (A Bᵀ + bias) where rows are outer products with rows of A and of B.

    For rows s_i a_iᵀ and t_j b_jᵀ the inner products are (s_iᵀt_j)(a_iᵀb_j), so that the rows themselves are never
    formed; a layer's bias, for which a_i = 1, adds a number to the second factor. Where several rows share one a, as
    the outputs of a sample do, A has fewer rows: row i of L goes with row i mod N of A.

    Args:
        gram: `[R1, R2]`; changed.
        left: L, `[R1, K]`.
        right: R, `[R2, K]`.
        inner: A `[N1, in]` and B `[N2, in]`, where N1 divides R1 and N2 divides R2; None for whole rows.
        bias: Added to A Bᵀ.
        lower: Write the lower triangle only, where the matrix is square and symmetric: a symmetric product in strips
            of rows takes little more than half the work of a whole.
    """
    period = len(left) if inner is None else len(inner[0])
    for start in range(0, len(left), max(period, 1)):
        for first in range(start, start + period, STRIP):
            last = min(first + STRIP, start + period)
            end = last if lower else len(right)
            strip = gram[first:last, :end]
            if inner is None:
                strip.addmm_(left[first:last], right[:end].T)
                continue
            a, b = inner
            outer, second = left[first:last] @ right[:end].T, a[first - start : last - start] @ b[:end].T
            if bias:
                second += bias
            for here in range(0, end, len(b)):
                there = min(here + len(b), end)
                strip[:, here:there].addcmul_(outer[:, here:there], second[:, : there - here])
