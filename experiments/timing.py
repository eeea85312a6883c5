"""A clock that waits for accelerators, medians' quartiles, and a quiet process while it runs."""

import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Generator, Sequence
from typing import Any, TypeVar

import torch

from experiments.environment import synchronize

T = TypeVar("T")


def seconds(function: Callable[[], Any], device: torch.device) -> float:
    """Return how long a call takes, work that it queued on an accelerator included."""
    synchronize(device)
    start = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - start


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """Return the first and the third quartile, interpolated; of one value, that value twice."""
    if len(values) == 1:
        return values[0], values[0]
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, third


def rotated(entries: Sequence[T], index: int) -> list[T]:
    """Return the entries from number `index` on, and then those before it.

    In turns, each round begins with another one, so that no one always follows the same neighbour's warm or cold
    caches.

    Args:
        entries: One or more.
        index: Number of the round, 0 or more.

    Returns:
        All of them.
    """
    shift = index % len(entries)
    return [*entries[shift:], *entries[:shift]]


@contextlib.contextmanager
def few_objects() -> Generator[None]:
    """Keep what exists out of the collector's sight, or each of its passes takes longer than what is measured."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextlib.contextmanager
def without_collector() -> Generator[None]:
    """Collect garbage now, and not while the clock runs."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@contextlib.contextmanager
def torch_threads(count: int) -> Generator[None]:
    """Compute with `count` threads within an operation, and afterwards with as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
