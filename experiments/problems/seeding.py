"""Initial weights from a seed alone."""

from collections.abc import Callable

import torch
from torch import nn


def seeded(make: Callable[[], nn.Module], seed: int, device: torch.device) -> nn.Module:
    """Make a network whose weights the seed alone decides; torch's own stream goes on as if nothing had been drawn.

    Args:
        make: Builds the network, on the CPU: every device gets the same weights.
        seed: Fixes what is drawn.
        device: Where the network shall live.

    Returns:
        The network.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make().to(device)
