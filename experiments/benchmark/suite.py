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


def _around(centre: Changes, *others: Changes) -> list[Changes]:
    """List a best guess, and what differs from it in a setting or two."""
    return [centre, *(centre | changes for changes in others)]


def _adam(problem: Problem) -> list[Changes]:
    """Rates a factor of three apart around the best known, and two batches."""
    if problem.name == "poisson":  # stiff: the rates that deserve a trial lie within one decade
        rates = (5e-3, 2e-3, 1e-2, 1e-3)
    elif problem.name == "autoencoder":
        rates = (3e-3, 1e-3, 1e-2, 3e-2)
    elif problem.dim == 2:
        rates = (1e-2, 3e-2, 1e-1, 3e-3)
    else:
        rates = (1e-2, 3e-3, 3e-2, 1e-3)
    return _product(lr=rates, batch_size=_first_order_batches(problem))


def _soap(problem: Problem) -> list[Changes]:
    """Adam's batches; its rotated steps bear, and want, higher rates."""
    if problem.rows is None and problem.dim == 2:  # its steps are dear beside its rows: the batch is worth a trial
        return _around(
            {"lr": 3e-2, "batch_size": 2048},
            {"lr": 1e-2},
            {"lr": 1e-1},
            {"batch_size": 1024},
            {"batch_size": 4096},
            {"lr": 1e-2, "batch_size": 1024},
            {"lr": 1e-1, "batch_size": 4096},
            {"lr": 1e-2, "batch_size": 4096},
        )
    return _product(lr=(1e-2, 3e-3, 3e-2, 1e-1), batch_size=_first_order_batches(problem))


def _first_order_batches(problem: Problem) -> tuple[int, int]:
    """Give two batches: on fixed rows all of them, and few; in hundreds of dimensions steps are dear, and small."""
    if problem.name == "autoencoder":
        return 256, 1500
    if problem.rows is not None:
        return problem.rows, problem.rows // 4
    if problem.dim == 2:
        return 1024, 4096
    return (256, 1024) if problem.dim <= 64 else (256, 512)


def _hessian_free(problem: Problem) -> list[Changes]:
    """On fixed rows the start and fall of λ, and the preconditioner's cost; else what trades noise for speed."""
    if problem.name == "poisson":
        return _product(omega=(2 / 3, 0.5), update_every=(3, 2, 5, 1))
    if problem.name == "autoencoder":
        return _around(
            {"damping": 150.0, "omega": 0.5, "minimum_damping": 1e-5, "curvature_batch": 512},
            {"damping": 30.0},
            {"damping": 500.0},
            {"omega": 2 / 3},
            {"minimum_damping": 1e-4},
            {"minimum_damping": 1e-6},
            {"curvature_batch": 750},
            {"curvature_batch": 256},
        )
    if problem.rows is not None:
        return _around(
            {"samples": 256, "weight": 0.1, "update_every": 10},
            {"samples": 128},
            {"samples": 512},
            {"weight": 0.3},
            {"update_every": 20},
            {"samples": 512, "update_every": 20},
            {"weight": 0.3, "update_every": 20},
            {"samples": 512, "weight": 0.3, "update_every": 20},
        )
    if problem.dim == 2:
        return _product(omega=(0.8, 0.9), minimum_damping=(1e-3, 1e-5), batch_size=(8192, 4096))
    if problem.dim <= 64:
        return _product(minimum_damping=(1e-6, 1e-4), omega=(0.8, 0.9), batch_size=(1024, 2048))
    return _around(
        {"batch_size": 512, "power": 0.5, "every": 4, "curvature_batch": 64},
        {"power": 1.0},
        {"power": 1.0, "curvature_batch": 256},
        {"power": 1.0, "curvature_batch": 512},
        {"power": 1.0, "batch_size": 1024},
        {"batch_size": 256, "every": 8},
        {"batch_size": 256, "every": 16},
        {"every": 1},
    )


def _kfac(problem: Problem) -> list[Changes]:
    """High rates, held back by a bound on the step."""
    return _product(batch_size=(512, 1024), largest_step=(1e-1, 3e-1), lr=(2.0, 4.0))


CONTENDERS = {
    "hessfree": Contender(_default("hessfree"), _hessian_free, lambda problem: True),
    "kfac": Contender(
        _default("kfac"),
        _kfac,
        lambda problem: problem.rows is None and problem.dim > 64,
    ),
    "adam": Contender(_default("adam"), _adam, lambda problem: True),
    "soap": Contender(_default("soap"), _soap, lambda problem: True),
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
