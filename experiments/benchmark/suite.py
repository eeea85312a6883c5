"""What the benchmark compares: problems with their budgets, contenders with the grids they are tuned over."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from experiments.benchmark import grids
from experiments.benchmark.grids import Changes
from experiments.optimizers import DenseFisherSettings, Settings, settings_class
from experiments.problems import Problem, parameters_of

CORE = (
    "8gaussians-fixed",
    "8gaussians-stable",
    "checkerboard-stable",
    "8gaussians",
    "8gaussians-ot",
    "moons",
    "digits",
    "digits-784",
    "conv",
    "poisson",
    "autoencoder",
)  # the problems of a run that names none
EXTENDED = ("8gaussians", "8gaussians-fixed", "conv", "digits")  # on which a run that names no contender has them all
BUDGETS = dict.fromkeys(CORE, 12.0) | {
    "8gaussians-fixed": 15.0,
    "digits-784": 15.0,
    "poisson": 30.0,
    "autoencoder": 60.0,
    "moons-fixed": 15.0,
    "checkerboard-fixed": 15.0,
    "moons-stable": 12.0,
    "checkerboard": 12.0,
    "moons-ot": 12.0,
    "checkerboard-ot": 12.0,
    "digits-784-w512": 30.0,
    "fashion-mnist": 15.0,
    "fashion-mnist-w512": 30.0,
}  # seconds of training, first step included


def _always(problem: Problem) -> bool:
    return True


def _never(problem: Problem) -> bool:
    return False


@dataclass(frozen=True)
class Contender:
    """An optimizer of the benchmark.

    Attributes:
        settings: Called as `settings(problem, **changes)`: the defaults for a problem, with changes.
        grid: The changes that are tried on a problem, `grids.TRIALS` of them; the first is the best guess.
        takes: Whether it can be run on a problem.
        core: Whether it runs on a problem outside `EXTENDED` where nobody names it.
    """

    settings: Callable[..., Settings]
    grid: Callable[[Problem], Sequence[Changes]]
    takes: Callable[[Problem], bool] = _always
    core: Callable[[Problem], bool] = _never


def _default(name: str) -> Callable[..., Settings]:
    """Give the settings that scripts/train.py would give."""
    return lambda problem, **changes: settings_class(name, problem).for_problem(problem, **changes)


def _fixed(problem: Problem) -> bool:
    return problem.rows is not None


def _streams_images(problem: Problem) -> bool:
    """Where K-FAC's steps without products pay most: hundreds of dimensions, and noise in every one."""
    return problem.rows is None and problem.dim > 64


def _dense_is_possible(problem: Problem) -> bool:
    """Where a step takes seconds, not minutes."""
    return problem.outputs > 1 and parameters_of(problem) <= DenseFisherSettings.largest // 2


def _gram_is_possible(problem: Problem) -> bool:
    """Where a few samples have a Gram matrix that takes milliseconds."""
    return 1 < problem.outputs <= 64


CONTENDERS = {
    "hessfree": Contender(_default("hessfree"), grids.hessian_free, core=_always),
    "kfac": Contender(_default("kfac"), grids.kfac, core=_streams_images),
    "adam": Contender(_default("adam"), grids.adam, core=_always),
    "soap": Contender(_default("soap"), grids.soap, core=_always),
    "lbfgs": Contender(_default("lbfgs"), grids.lbfgs, takes=_fixed, core=_always),
    "sgd": Contender(_default("sgd"), grids.sgd),
    "adamw": Contender(_default("adamw"), grids.adamw),
    "muon": Contender(_default("muon"), grids.muon),
    "shampoo": Contender(_default("shampoo"), grids.shampoo),
    "gram": Contender(_default("gram"), grids.gram, takes=_gram_is_possible),
    "dense-fisher": Contender(_default("dense-fisher"), grids.dense_fisher, takes=_dense_is_possible),
}
OURS, REFERENCE = "hessfree", "adam"  # whose result the others' are divided by; whose final score is the mark to reach


def contenders(problem: Problem, named: Sequence[str] | None = None) -> list[str]:
    """Name the contenders on a problem.

    Args:
        problem: What is to be solved.
        named: Those the user wants; None: the core, and on the problems of `EXTENDED` all.

    Returns:
        Names, in the order of `CONTENDERS`, of those that take the problem.
    """
    wide = problem.name in EXTENDED
    return [
        name
        for name, one in CONTENDERS.items()
        if (wide or one.core(problem) if named is None else name in named) and one.takes(problem)
    ]
