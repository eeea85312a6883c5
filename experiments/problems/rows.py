"""Rows that are fixed: all of them at once, or shuffled minibatches."""

from collections.abc import Sized
from typing import Any, Generic, Protocol, Self, TypeVar

import torch
from torch import Tensor


class Rows(Sized, Protocol):
    """A tensor, or several of one length side by side."""

    def __getitem__(self, rows: Tensor, /) -> Self:
        """Give the rows of these indices."""


R = TypeVar("R", bound=Rows)


class FixedRows(Generic[R]):
    """Epochs over fixed rows, each in a new order; whoever asks for all gets them as they are, every time.

    The order is one permutation after the other, the same for a seed however it is cut into batches: each row has been
    used equally often after each epoch, also where the size of a batch does not divide their number.
    """

    def __init__(self, rows: R, seed: int, device: torch.device | str = "cpu") -> None:
        """Start before the first epoch.

        Args:
            rows: All rows.
            seed: Fixes the order.
            device: Where the rows live.
        """
        self._rows = rows
        self._generator = torch.Generator().manual_seed(seed)
        self._device = device
        self._left = torch.empty(0, dtype=torch.int64)

    def draw(self, n: int) -> R:
        """Take the next rows.

        Args:
            n: How many.

        Returns:
            n rows of the epoch's order; if n is at least their number, all rows: the very same tensors at every call,
            so that an optimizer of fixed data really sees fixed data.
        """
        if n >= len(self._rows):
            return self._rows
        if n > len(self._left):
            order = torch.randperm(len(self._rows), generator=self._generator)
            self._left = torch.cat([self._left, order])
        indices, self._left = self._left[:n], self._left[n:]
        return self._rows[indices.to(self._device)]

    def state_dict(self) -> dict[str, Any]:
        """Give the place in the sequence: the generator's state, and what is left of the epoch."""
        return {"generator": self._generator.get_state(), "left": self._left}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a place in the sequence.

        Args:
            state: From the `state_dict` of a stream over the same rows.
        """
        self._generator.set_state(state["generator"])
        self._left = state["left"]
