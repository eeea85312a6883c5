"""Ways to see the flat outputs of a network as a stack of small blocks of equal width."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from hessfree.vectors import FlatSpace


@dataclasses.dataclass(frozen=True)
class Layout:
    """A way to see the flat outputs as `count` blocks of `width` numbers.

    Attributes:
        count: Number of blocks.
        width: Numbers a block.
        gather: `[Z]` -> `[count, width]`.
        scatter: `[count, width]` -> `[Z]`.
        dim: The dimension of the outputs that a block runs along; 0 where a block is a whole sample.
    """

    count: int
    width: int
    gather: Callable[[Tensor], Tensor]
    scatter: Callable[[Tensor], Tensor]
    dim: int

    def within(self, part: FlatSpace) -> Layout:
        """Return the same layout of `part`, the outputs of some of the samples."""
        return next(layout for layout in layouts(part) if layout.dim == self.dim)


def layouts(space: FlatSpace) -> Iterator[Layout]:
    """See the outputs as blocks, from fine to coarse: the last dimension, dimension 1, whole samples.

    Args:
        space: The flat space of the outputs.

    Yields:
        Layouts; dimension 1 is for outputs like `[N, C, H, W]`. None where the outputs share no dimension 0, or
        are empty.
    """
    if space.size == 0:
        return
    if len(space.shapes) == 1 and len(space.shapes[0]) >= 2:
        shape = space.shapes[0]
        for dim in dict.fromkeys((len(shape) - 1, 1)):
            moved = torch.Size((*shape[:dim], *shape[dim + 1 :], shape[dim]))
            width = shape[dim]
            yield Layout(
                space.size // width,
                width,
                functools.partial(_move_last, shape=shape, dim=dim),
                functools.partial(_move_back, shape=moved, dim=dim),
                dim,
            )
    if len(space.shapes) == 1 and len(space.shapes[0]) == 2:
        return  # the last dimension is the whole sample
    counts = {shape[0] if shape else 0 for shape in space.shapes}
    if len(counts) == 1 and 0 not in counts:
        (n,) = counts
        widths = [numel // n for numel in space.numels]
        yield Layout(
            n,
            sum(widths),
            lambda flat: torch.cat([t.reshape(n, -1) for t in flat.split(space.numels)], 1),
            lambda blocks: torch.cat([t.reshape(-1) for t in blocks.split(widths, 1)]),
            0,
        )


def _move_last(flat: Tensor, shape: torch.Size, dim: int) -> Tensor:
    return flat.view(shape).movedim(dim, -1).reshape(-1, shape[dim])


def _move_back(blocks: Tensor, shape: torch.Size, dim: int) -> Tensor:
    return blocks.reshape(shape).movedim(-1, dim).reshape(-1)
