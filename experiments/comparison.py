"""Several optimizers from equal initial weights, on equal rows of data, for equal seconds, one after the other."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import nn

from experiments.optimizers import Settings
from experiments.problems import Problem
from experiments.training import Observer, Point, Run, Trial, train

SWEEP_SHARE = 0.25  # of the budget, for each learning rate that is tried
_SWEEP_SEED_OFFSET = 1000


def load_torch_optimizers() -> None:
    """Make torch load what it defers until the first optimizer of any kind is built: about 2 s on two cores.

    Without this the optimizer that happens to run first would pay for all that follow.
    """
    torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.0)


def sweep(problem: Problem, name: str, settings: Settings, *, seed: int, budget_seconds: float) -> list[Trial]:
    """Try the learning rates of an optimizer, each for a short time with a full schedule.

    Args:
        problem: What is solved.
        name: What to call the optimizer.
        settings: Its settings.
        seed: Of the comparison; the trials use another one, so that nothing is tuned on what is reported.
        budget_seconds: Of the comparison; a trial gets `SWEEP_SHARE` of it.

    Returns:
        One trial a learning rate.
    """
    trials = []
    for lr in settings.lr_grid:
        candidate: Settings = dataclasses.replace(cast(Any, settings), lr=lr)
        share = SWEEP_SHARE * budget_seconds
        run = train(problem, name, candidate, seed=seed + _SWEEP_SEED_OFFSET, budget_seconds=share, moments=())
        trials.append(Trial(lr, run.final.losses[problem.score]))
    return trials


def compare(
    problem: Problem,
    contenders: dict[str, Settings],
    *,
    seed: int,
    budget_seconds: float,
    observers: Sequence[Observer] = (),
    say: Callable[[str], None] = print,
) -> list[Run]:
    """Run the optimizers one after the other.

    Args:
        problem: What is solved.
        contenders: Settings by name; those without a learning rate are swept first.
        seed: Fixes initial weights and data, equal for all.
        budget_seconds: Seconds of training for each.
        observers: Told of every point of every run, sweeps excepted.
        say: Prints a line of progress.

    Returns:
        One run an optimizer, in the order given.
    """
    load_torch_optimizers()

    def observer(name: str, point: Point) -> None:
        for tell in observers:
            tell(name, point)

    runs = []
    for name, settings in contenders.items():
        trials: list[Trial] = []
        if settings.lr is None:
            trials = sweep(problem, name, settings, seed=seed, budget_seconds=budget_seconds)
            best = min(trials, key=lambda trial: trial.score if math.isfinite(trial.score) else math.inf)
            settings = dataclasses.replace(cast(Any, settings), lr=best.lr)
            tried = ", ".join(f"{trial.lr:g}: {trial.score:.4g}" for trial in trials)
            say(f"{name}: learning rates on seed {seed + _SWEEP_SEED_OFFSET}: {tried}; takes {best.lr:g}")
        run = train(problem, name, settings, seed=seed, budget_seconds=budget_seconds, observer=observer)
        score = run.final.losses[problem.score]
        say(f"{name}: {run.final.step} steps in {run.final.seconds:.1f} s to {score:.4g}")
        runs.append(dataclasses.replace(run, sweep=tuple(trials)))
    return runs
