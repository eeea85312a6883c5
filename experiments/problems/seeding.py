"""Initial weights from a seed alone."""

import contextlib
from collections.abc import Generator

import torch


@contextlib.contextmanager
def seeded(seed: int) -> Generator[None]:
    """Let torch's own stream on the CPU start at a seed, and go on afterwards as if nothing had been drawn.

    Args:
        seed: Fixes what is drawn inside.

    Yields:
        Nothing.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
