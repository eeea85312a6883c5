"""What several ranks have each measured on their own batch, put together, so that all go on with the same numbers.

The curvature of all is the mean of the ranks' G_r. Exactness of the solver's answer does not hang on a preconditioner,
but the ranks' agreement does: everything that is learned is reduced before it is used.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hessfree.distributed import Ranks
from hessfree.preconditioners.base import Sample
from hessfree.preconditioners.layer_calls import LayerCalls

Rows = list[dict[str, Tensor]]


def share_factors(
    ranks: Ranks,
    layers: Sequence[LayerCalls],
    inner: list[Tensor | None],
    outer: list[Tensor],
    squares: list[Tensor],
    measured: Sequence[int],
) -> bool:
    """Make K-FAC's factors those of all ranks' batches; in place, one message.

    A is the mean over all rows of all ranks, S and the diagonal the means of the ranks': with the cotangents drawn for
    all batches at once, both are what one process would find.

    Args:
        ranks: The processes that learn together.
        layers: The layers of this rank.
        inner: A, or None.
        outer: S.
        squares: The diagonal at other parameters.
        measured: Numbers of the layers whose A was measured on this rank's batch.

    Returns:
        Whether all ranks have the same layers; else nothing is changed.
    """
    if ranks.size == 1:
        return True
    shapes = [None if a is None else tuple(a.shape) for a in inner]
    words = [layer.place for layer in layers], shapes, [tuple(t.shape) for t in (*outer, *squares)], list(measured)
    if not _same(ranks, words):
        return False
    weighted = [a * layers[i].rows for i in measured if (a := inner[i]) is not None]
    own = (*weighted, *outer, *squares)
    if not own:
        return True
    counts = torch.tensor([float(layers[i].rows) for i in measured], dtype=own[0].dtype, device=own[0].device)
    *found, counts = ranks.sums([*own, counts])
    for k, i in enumerate(measured):
        inner[i] = found[k] / counts[k]
    means = iter([t / ranks.size for t in found[len(measured) :]])
    outer[:] = [next(means) for _ in outer]
    squares[:] = [next(means) for _ in squares]
    return True


def share_of_samples(sample: Sample, count: int | None) -> int | None:
    """Return how many of `count` samples of all ranks this rank is to take: in proportion to what it has."""
    if count is None or sample.ranks.size == 1:
        return count
    total = sum(samples for _, _, samples in sample.shares)
    return max(1, math.ceil(count * sample.samples / total))


def share_rows(ranks: Ranks, make: Callable[[], tuple[Rows, bool]]) -> tuple[Rows, bool] | None:
    """Return rows U of all ranks, one rank's after another's, with UᵀU the mean of the ranks' U_rᵀU_r.

    Args:
        ranks: The processes that learn together.
        make: Returns this rank's rows, and whether they are complete (see `jacobian_rows`).

    Returns:
        The rows, and whether those of all ranks are complete; None where the ranks' rows do not fit together.
    """
    if ranks.size == 1:
        return make()
    rows, complete = ranks.guard(make)
    if not _same(ranks, [[(name, tuple(t.shape[1:])) for name, t in part.items()] for part in rows]):
        return None
    complete = all(row[0] for row in ranks.agree(None, complete))
    scale = ranks.size**-0.5
    own = [t if name == "a" else t * scale for part in rows for name, t in part.items()]
    joined = iter(ranks.rows(own))
    return [{name: next(joined) for name in part} for part in rows], complete


def _same(ranks: Ranks, words: object) -> bool:
    """Tell whether `words` are the same on all ranks."""
    code = float(zlib.crc32(repr(words).encode()))
    return len({row[0] for row in ranks.agree(None, code)}) == 1
