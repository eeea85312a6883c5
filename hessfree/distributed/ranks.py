"""All communication between processes: numbers, vectors, rows and errors of the ranks of one data-parallel group.

The objective of a group is the mean of its ranks' losses, whatever their batches hold. Vectors are replicated: every
rank does the same arithmetic on the same bits, so that what has been reduced once needs no further messages. A group
of one process sends nothing.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")

WIDTH = 8  # numbers of a status: one shape for all, so that the message of a rank that failed fits wherever others are
TEXT = 512  # bytes of an error's words


class RankError(RuntimeError):
    """Another rank raised an error, and no rank took the step."""


class Ranks:
    """The processes that take one step together.

    Attributes:
        group: Their process group; None for this process alone.
        size: How many they are.
        rank: The number of this one among them.
    """

    def __init__(self, group: Any = None, device: torch.device | None = None) -> None:
        """Describe a group.

        Args:
            group: A `torch.distributed.ProcessGroup`; None for this process alone.
            device: Where the parameters live.
        """
        self.group = group
        self.size = 1 if group is None else dist.get_world_size(group)
        self.rank = 0 if group is None else dist.get_rank(group)
        self._hosts = group is None or "gloo" in str(dist.get_backend(group)) or "mpi" in str(dist.get_backend(group))
        self._device = torch.device("cpu") if self._hosts or device is None else device
        self._held: Exception | None = None
        self._told: BaseException | None = None

    def agree(self, error: Exception | None = None, *numbers: float) -> list[tuple[float, ...]]:
        """Exchange a status: whether this rank is well, and a few numbers.

        Args:
            error: What went wrong on this rank; None where nothing did, or `hold` was told already.
            *numbers: At most seven.

        Returns:
            The numbers of every rank, in the order of the ranks, bit for bit.

        Raises:
            Exception: `error`, on the rank that gave it.
            RankError: Another rank gave one.
        """
        error, self._held = error or self._held, None
        if self.size == 1:
            if error is not None:
                raise error
            return [numbers]
        status = (float(error is not None), *numbers, *[0.0] * (WIDTH - 1 - len(numbers)))
        rows = self._gather_bits(struct.unpack(f"{WIDTH}q", struct.pack(f"{WIDTH}d", *status)))
        found = [struct.unpack(f"{WIDTH}d", struct.pack(f"{WIDTH}q", *row)) for row in rows]
        failed = [rank for rank, row in enumerate(found) if row[0] != 0]
        if not failed:
            return [row[1 : 1 + len(numbers)] for row in found]
        words = "" if error is None else f"{type(error).__name__}: {error}"
        text = words.encode()[:TEXT].ljust(TEXT, b"\0")
        texts = self._gather_bits(struct.unpack(f"{TEXT // 8}q", text))
        if error is not None:
            self._told = error
            raise error
        first = struct.pack(f"{TEXT // 8}q", *texts[failed[0]]).rstrip(b"\0").decode(errors="replace")
        self._told = RankError(f"rank {failed[0]} of {self.size} failed, and no rank took the step: {first}")
        raise self._told

    def tell(self, error: Exception) -> None:
        """Let the other ranks know of `error`, unless they do already.

        Args:
            error: What is about to be raised here.

        Raises:
            Exception: `error` itself.
        """
        try:
            seen: BaseException | None = error
            while seen is not None:
                if seen is self._told:  # or was raised because of it, by a closure that translates errors
                    raise error
                seen = seen.__cause__ or seen.__context__
            self.agree(error)
        finally:
            self._told = None  # its traceback holds the step's graph
        raise error

    def guard(self, function: Callable[[], T]) -> T:
        """Call `function`, which sends nothing, and fail on all ranks where it fails on one.

        Args:
            function: Work of this rank alone.

        Returns:
            What it returned.

        Raises:
            Exception: What it raised.
            RankError: It raised something on another rank.
        """
        if self.size == 1:
            return function()
        try:
            result = function()
        except Exception as error:
            self.agree(error)
            raise
        self.agree()
        return result

    def hold(self, error: Exception) -> None:
        """Keep `error` for the next status, where there is no room for one now."""
        self._held = self._held or error

    def mean_number(self, function: Callable[[], float]) -> float:
        """Return the mean over ranks of what `function`, which sends nothing, returns; failing on all or on none."""
        if self.size == 1:
            return function()
        try:
            value = function()
        except Exception as error:
            self.agree(error)
            raise
        return mean(row[0] for row in self.agree(None, value))

    def mean(self, vector: Tensor) -> Tensor:
        """Return the mean over ranks of a tensor that each has for its own; in place. One message."""
        return self.sum(vector).div_(self.size) if self.size > 1 else vector

    def sum(self, vector: Tensor) -> Tensor:
        """Return the sum over ranks of a tensor that each has for its own; in place. One message."""
        if self.size == 1:
            return vector
        carried = self._carried(vector)
        dist.all_reduce(carried, group=self.group)
        return vector.copy_(carried) if carried is not vector else vector

    def sums(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the sums over ranks of several tensors of one dtype. One message.

        Args:
            tensors: Of the same shapes on all ranks.

        Returns:
            New tensors; the given ones in a group of one process.
        """
        if self.size == 1 or not tensors:
            return list(tensors)
        flat = self.sum(torch.cat([t.reshape(-1) for t in tensors]))
        pieces = flat.split([t.numel() for t in tensors])
        return [piece.view(t.shape) for piece, t in zip(pieces, tensors, strict=True)]

    def rows(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return tensors whose rows are those of all ranks, in the order of the ranks. Two messages.

        Args:
            tensors: All `[R, ...]` with the same R; other ranks may have another R, but the same trailing shapes.

        Returns:
            `[sum of R, ...]` each.
        """
        if self.size == 1 or not tensors:
            return list(tensors)
        count = len(tensors[0])
        counts = [int(row[0]) for row in self.agree(None, count)]
        flat = torch.cat([t.reshape(count, math.prod(t.shape[1:])) for t in tensors], 1)
        padded = flat.new_zeros(max(counts), flat.shape[1])
        padded[:count] = flat
        whole = self.gather(padded).unflatten(0, (self.size, max(counts)))
        joined = torch.cat([part[:n] for part, n in zip(whole, counts, strict=True)])
        pieces = joined.split([math.prod(t.shape[1:]) for t in tensors], 1)
        return [p.reshape(len(joined), *t.shape[1:]) for p, t in zip(pieces, tensors, strict=True)]

    def gather(self, tensor: Tensor) -> Tensor:
        """Return the ranks' tensors `[R, ...]`, of one shape, one after another: `[ranks · R, ...]`. One message."""
        carried = self._carried(tensor)
        whole = carried.new_empty(self.size * tensor.shape[0], *tensor.shape[1:])
        # torch 2.14 renamed both, and warns of the old names
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        gather(whole, carried.contiguous(), group=self.group)
        return whole.to(tensor.device)

    def scatter_sum(self, vector: Tensor) -> Tensor:
        """Return this rank's part `[P / ranks]` of the sum of the ranks' vectors `[P]`. One message."""
        carried = self._carried(vector)
        part = carried.new_empty(len(vector) // self.size)
        scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        scatter(part, carried, group=self.group)
        return part.to(vector.device)

    def _gather_bits(self, row: Sequence[int]) -> list[list[int]]:
        own = torch.tensor([row], dtype=torch.int64, device=self._device)
        return self.gather(own).tolist()

    def _carried(self, tensor: Tensor) -> Tensor:
        """Return the tensor where the group's backend can take it: gloo knows the host and CUDA only."""
        return tensor.cpu() if self._hosts and tensor.device.type not in {"cpu", "cuda"} else tensor


ALONE = Ranks()


def mean(numbers: Any) -> float:
    """Return the mean of some numbers, the same on every rank that adds them in the same order."""
    values = list(numbers)
    return sum(values) / len(values)
