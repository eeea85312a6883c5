"""What the benchmark compares: problems with their budgets, contenders with the grids they are tuned over."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from experiments.optimizers import Settings, settings_class
from experiments.problems import Problem

Changes = dict[str, Any]  # settings by name, where they differ from the defaults for a problem

BUDGETS = {
    "8gaussians-fixed": 15.0,
    "8gaussians-stable": 12.0,
    "checkerboard-stable": 12.0,
    "8gaussians": 12.0,
    "moons": 12.0,
    "digits": 12.0,
    "digits-784": 15.0,
    "poisson": 30.0,
    "autoencoder": 60.0,
}  # seconds of training, first step included
TRIALS = 8  # settings that each contender may try on each problem: as many for ours as for the rivals


@dataclass(frozen=True)
class Contender:
    """An optimizer of the benchmark.

    Attributes:
        settings: Called as `settings(problem, **changes)`: the defaults for a problem, with changes.
        grid: The changes that are tried on a problem, `TRIALS` of them; the first is the best guess.
        takes: Whether it can, and should, be run on a problem.
    """

    settings: Callable[..., Settings]
    grid: Callable[[Problem], Sequence[Changes]]
    takes: Callable[[Problem], bool]


def _product(**values: Sequence[Any]) -> list[Changes]:
    """Combine the values of several settings, the last named running fastest."""
    return [dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values())]


def _default(name: str) -> Callable[..., Settings]:
    """Give the settings that scripts/train.py would give."""
    return lambda problem, **changes: settings_class(name, problem).for_problem(problem, **changes)


def _first_order(problem: Problem) -> list[Changes]:
    """Rates around where Adam and SOAP are best in two dimensions, and three times lower above; two batches."""
    rates = (1e-2, 3e-3, 3e-2, 1e-1) if problem.dim == 2 else (1e-2, 3e-3, 3e-2, 1e-3)
    if problem.rows is not None:
        return _product(lr=rates, batch_size=(problem.rows, problem.rows // 4))
    return _product(lr=rates, batch_size=(1024, 4096) if problem.dim == 2 else (256, 1024))


def _hessian_free(problem: Problem) -> list[Changes]:
    """The batch and the floor of the damping, which trade noise for speed; on fixed rows the preconditioner's size."""
    if problem.rows is not None:
        samples = sorted({min(n, problem.rows) for n in (128, 256, 512, 1024)})
        return _product(damping=(0.3, 0.03), samples=samples)
    if problem.dim == 2:
        return _product(minimum_damping=(1e-3, 1e-5), batch_size=(8192, 4096, 2048, 16384))
    batches = (1024, 2048, 4096, 512) if problem.dim <= 64 else (512, 1024, 2048, 256)
    return _product(minimum_damping=(1e-6, 1e-4), batch_size=batches)


CONTENDERS = {
    "hessfree": Contender(_default("hessfree"), _hessian_free, lambda problem: True),
    "kfac": Contender(
        _default("kfac"),
        lambda problem: _product(lr=(0.15, 0.1, 0.05, 0.3), batch_size=(1024, 512)),
        lambda problem: problem.rows is None and problem.dim > 64,
    ),
    "adam": Contender(_default("adam"), _first_order, lambda problem: True),
    "soap": Contender(_default("soap"), _first_order, lambda problem: True),
    "lbfgs": Contender(
        _default("lbfgs"),
        lambda problem: _product(lr=(1.0, 0.5), history=(100, 30, 10, 300)),
        lambda problem: problem.rows is not None,
    ),
}
OURS, REFERENCE = "hessfree", "adam"  # whose result the others' are divided by; whose final score is the mark to reach


def contenders(problem: Problem, named: Sequence[str] | None = None) -> list[str]:
    """Name the contenders on a problem.

    Args:
        problem: What is to be solved.
        named: Those the user wants; None: all.

    Returns:
        Names, in the order of `CONTENDERS`, of those that take the problem.
    """
    return [name for name, one in CONTENDERS.items() if (named is None or name in named) and one.takes(problem)]
