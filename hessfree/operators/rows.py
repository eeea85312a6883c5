"""Rows of Jacobians, a bounded number at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from hessfree.vectors import FlatSpace

CHUNK = 2**24  # numbers of J held at once


def unit_rows(space: FlatSpace, size: int) -> Iterator[Tensor]:
    """Yield the unit vectors of the outputs' space, in order and in chunks.

    Args:
        space: The flat space `[Z]` of the outputs.
        size: P, the length of the row of J that each unit vector stands for.

    Yields:
        `[R, Z]`, with R such that `[R, P]` stays within `CHUNK` numbers.
    """
    step = at_once(size)
    for i in range(0, space.size, step):
        count = min(step, space.size - i)
        units = torch.zeros(count, space.size, dtype=space.dtype, device=space.device)
        units.diagonal(i).fill_(1)
        yield units


def at_once(size: int) -> int:
    """Return how many rows of `size` numbers to hold at once, at least one."""
    return max(1, CHUNK // size)
