"""A closed form of the output Hessian put together from those of several outputs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from hessfree.losses.forms import Form
from hessfree.vectors import FlatSpace


class JoinedForm(Form):
    """H = block-diag over the outputs, each with a form of its own, where the loss couples no two of them.

    So it is with micro-batches whose losses are added up, of equal sizes or not, and with heads that have a loss each.
    """

    determined = False

    def __init__(self, parts: Sequence[Form], space: FlatSpace) -> None:
        """Take the form of each output, and the flat space of all of them."""
        self._parts, self._numels = tuple(parts), list(space.numels)
        self._spaces = [FlatSpace([shape], [space.dtype], space.device) for shape in space.shapes]
        self.words = " + ".join(dict.fromkeys(part.words for part in parts))

    @functools.cached_property
    def negative(self) -> float:
        """The largest share that `Form.negative` has at any output."""
        return max(part.negative for part in self._parts)

    def matvec(self, w: Tensor) -> Tensor:
        """Return H w for `w` `[Z]`."""
        return self._each(w, lambda part, piece: part.matvec(piece))

    def root(self, e: Tensor) -> Tensor:
        """Return B e for `e` `[Z]`."""
        return self._each(e, lambda part, piece: part.root(piece))

    def transposed_root(self, w: Tensor) -> Tensor:
        """Return Bᵀ w for `w` `[Z]`."""
        return self._each(w, lambda part, piece: part.transposed_root(piece))

    def within(self, whole: FlatSpace, rows: slice) -> JoinedForm:
        """See `Form.within`."""
        parts = [part.within(space, rows) for part, space in zip(self._parts, self._spaces, strict=True)]
        return JoinedForm(parts, whole.of_rows(rows))

    def columns(self, like: FlatSpace) -> Iterator[Tensor]:
        """Yield the columns of every output's root, zero at the other outputs (see `Form.columns`).

        Args:
            like: The flat space of the outputs.

        Yields:
            As many vectors as the forms of the outputs have columns, in all.
        """
        start = 0
        for output, numel in enumerate(self._numels):
            for column in self.columns_of(output):
                padded = like.zeros()
                padded[start : start + numel] = column
                yield padded
            start += numel

    def columns_of(self, output: int) -> Iterator[Tensor]:
        """Return the columns of one output's root, each with the numbers of this output alone.

        Args:
            output: Its number.

        Returns:
            The columns (see `Form.columns`).
        """
        return self._parts[output].columns(self._spaces[output])

    def _each(self, flat: Tensor, apply: Callable[[Form, Tensor], Tensor]) -> Tensor:
        pieces = zip(self._parts, flat.split(self._numels), strict=True)
        return torch.cat([apply(part, piece) for part, piece in pieces])
