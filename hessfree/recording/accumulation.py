"""How many backward passes went into `p.grad` since it was last cleared."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

from torch import Tensor


class BackwardCounter:
    """Counts, for each parameter, the gradients accumulated since `reset`.

    With gradients accumulated over k micro-batches, the recorded loss of a step is that of the last one, and
    its curvature one k-th of that of the sum.

    Attributes:
        total: Gradients accumulated by all parameters, ever.
    """

    def __init__(self) -> None:
        """Count nothing yet."""
        self.total = 0
        self._counts: dict[int, int] = {}
        self._handles: list[Any] = []

    def watch(self, params: Sequence[Tensor]) -> None:
        """Begin to count for `params`, and for no others.

        Args:
            params: Leaf tensors that require grad. The hooks hold no reference to this object.
        """
        self.close()
        own = weakref.ref(self)

        def count(p: Tensor) -> None:
            counter = own()
            if counter is not None:
                counter.total += 1
                counter._counts[id(p)] = counter._counts.get(id(p), 0) + 1

        self._handles = [p.register_post_accumulate_grad_hook(count) for p in params]

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def reset(self) -> None:
        """Start again from zero."""
        self._counts.clear()

    def batches(self, accumulated: bool, backwards: int) -> float:
        """Return k where `p.grad` is the sum over k micro-batches, of which the recorded loss is one.

        Args:
            accumulated: Whether `p.grad` held something before the recorded loss was differentiated.
            backwards: How many backward passes the recorded loss is made of.

        Returns:
            k, at least 1.
        """
        return max(1.0, self.highest() / backwards) if accumulated else 1.0

    def highest(self) -> int:
        """Return the most gradients that any parameter has accumulated."""
        return max(self._counts.values(), default=0)
