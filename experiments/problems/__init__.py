"""The problems on which optimizers are compared, by name."""

from collections.abc import Callable

import torch

from experiments import data
from experiments.environment import UsageError
from experiments.problems.autoencoder import DigitsAutoencoder
from experiments.problems.base import Noisy, Problem, Stream
from experiments.problems.flow import FixedFlowMatching, FlowMatching, StableFlowMatching
from experiments.problems.poisson import Poisson

_FLOWS: dict[str, type[FlowMatching] | type[FixedFlowMatching]] = {
    "": FlowMatching,
    "-stable": StableFlowMatching,
    "-fixed": FixedFlowMatching,
}


def _flow(kind: str, dataset: str) -> Callable[[torch.device], Problem]:
    return lambda device: _FLOWS[kind].of(data.load(dataset), device)


_MAKERS: dict[str, Callable[[torch.device], Problem]] = {
    **{dataset + kind: _flow(kind, dataset) for kind in _FLOWS for dataset in data.NAMES},
    "autoencoder": DigitsAutoencoder.of,
    "poisson": Poisson.of,
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
    return _MAKERS[name](torch.device(device))
