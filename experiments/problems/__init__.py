"""The problems on which optimizers are compared, by name."""

from collections.abc import Callable

import torch

from experiments import data
from experiments.environment import UsageError
from experiments.problems.base import Noisy, Problem, Stream
from experiments.problems.flow import FlowMatching

_MAKERS: dict[str, Callable[[str, torch.device], Problem]] = {
    name: lambda name, device: FlowMatching.of(data.load(name), device) for name in data.NAMES
}
PROBLEMS = tuple(_MAKERS)

__all__ = ["PROBLEMS", "Noisy", "Problem", "Stream", "make"]


def make(name: str, device: torch.device | str = "cpu") -> Problem:
    """Find a problem by name.

    Args:
        name: One of `PROBLEMS`.
        device: Where the training runs.

    Returns:
        The problem.

    Raises:
        UsageError: If there is no such problem.
    """
    if name not in PROBLEMS:
        raise UsageError(f"problem {name!r} is unknown; choose one of: {', '.join(PROBLEMS)}")
    return _MAKERS[name](name, torch.device(device))
