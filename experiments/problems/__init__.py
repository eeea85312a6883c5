"""The problems on which optimizers are compared, by name."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from experiments import data
from experiments.environment import UsageError
from experiments.paths import Paths
from experiments.problems.autoencoder import DigitsAutoencoder
from experiments.problems.base import Layered, Noisy, Problem, Stream, parameters_of
from experiments.problems.classifier import DigitsClassifier
from experiments.problems.flow import FixedFlowMatching, FlowMatching, StableFlowMatching
from experiments.problems.poisson import Poisson

Maker = Callable[[data.Dataset, torch.device], Problem]

_OT = Paths(coupling="ot")
_WIDE = 512
_FLOWS: dict[str, Maker] = {
    "": FlowMatching.of,
    "-stable": StableFlowMatching.of,
    "-fixed": FixedFlowMatching.of,
    "-ot": partial(FlowMatching.of, paths=_OT),
    f"-w{_WIDE}": partial(FlowMatching.of, width=_WIDE),
}
_OTHERS: dict[str, Callable[[torch.device], Problem]] = {
    "conv": DigitsClassifier.of,
    "autoencoder": DigitsAutoencoder.of,
    "poisson": Poisson.of,
}
_KINDS = {dataset + kind: (dataset, of) for kind, of in _FLOWS.items() for dataset in data.NAMES}
PROBLEMS = (*_KINDS, *_OTHERS)

__all__ = ["PROBLEMS", "Layered", "Noisy", "Problem", "Stream", "make", "parameters_of"]


def make(name: str, device: torch.device | str = "cpu", root: Path | None = None) -> Problem:
    """Find a problem by name.

    Args:
        name: One of `PROBLEMS`.
        device: Where the training runs.
        root: Where the files of data sets are that have files; see `experiments.data.load`.

    Returns:
        The problem.

    Raises:
        UsageError: If there is no such problem, or its data cannot be read.
    """
    if name not in PROBLEMS:
        raise UsageError(f"problem {name!r} is unknown; choose one of: {', '.join(PROBLEMS)}")
    if name in _OTHERS:
        return _OTHERS[name](torch.device(device))
    dataset, of = _KINDS[name]
    return of(data.load(dataset, root=root), torch.device(device))
