"""Several optimizers from equal initial weights, on equal rows of data, for equal seconds, one after the other."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import nn

from experiments.checkpoint import Checkpoint
from experiments.optimizers import Settings
from experiments.problems import Problem
from experiments.records import Budget, Observer, Point, Run, Trial
from experiments.training import Task, Training, Watch, train

Trainer = Callable[..., Run]  # called as `train` is
SWEEP_SHARE = 0.25  # of the budget, for each learning rate that is tried
_SWEEP_SEED_OFFSET = 1000


def load_torch_optimizers() -> None:
    """Make torch load what it defers until the first optimizer of any kind is built: about 2 s on two cores.

    Without this the optimizer that happens to run first would pay for all that follow.
    """
    torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.0)


def sweep(
    problem: Problem,
    name: str,
    settings: Settings,
    *,
    seed: int,
    budget: Budget,
    trainer: Trainer,
    checkpoint: Checkpoint,
    watch: Watch | None = None,
) -> list[Trial]:
    """Try the learning rates of an optimizer, each for a short time with a full schedule.

    Args:
        problem: What is solved.
        name: What to call the optimizer.
        settings: Its settings.
        seed: Of the comparison; the trials use another one, so that nothing is tuned on what is reported.
        budget: Of the comparison; a trial gets `SWEEP_SHARE` of it.
        trainer: Makes a run.
        checkpoint: Knows the trials that are done already, and is told of those that follow.
        watch: Called after every step.

    Returns:
        One trial a learning rate.
    """
    trials = checkpoint.trials_of(name)
    share = budget.share(SWEEP_SHARE)
    for lr in settings.lr_grid[len(trials) :]:
        task = Task(
            problem,
            f"{name}, lr {lr:g}",
            dataclasses.replace(cast(Any, settings), lr=lr),
            seed=seed + _SWEEP_SEED_OFFSET,
            budget=share,
            moments=(),
        )
        run = trainer(task, watch=_both(watch, checkpoint.watch_trial))
        trials.append(Trial(lr, run.final.losses[problem.score]))
        checkpoint.add_trial(name, trials[-1])
    return trials


def compare(
    problem: Problem,
    contenders: dict[str, Settings],
    *,
    seed: int,
    budget: Budget,
    observers: Sequence[Observer] = (),
    say: Callable[[str], None] = print,
    checkpoint: Checkpoint | None = None,
    watch: Watch | None = None,
    trainer: Trainer | None = None,
) -> list[Run]:
    """Run the optimizers one after the other.

    Args:
        problem: What is solved.
        contenders: Settings by name; those without a learning rate are swept first.
        seed: Fixes initial weights and data, equal for all.
        budget: Of each.
        observers: Told of every point of every run, sweeps excepted.
        say: Prints a line of progress.
        checkpoint: Holds what is done already, and is told of what follows; None: nothing is, and nobody is told.
        watch: Called after every step.
        trainer: Makes a run; None: `train`.

    Returns:
        One run an optimizer, in the order given.

    Raises:
        Interrupted: If the checkpoint's user asks to stop.
    """
    load_torch_optimizers()
    checkpoint = Checkpoint(None, {}) if checkpoint is None else checkpoint
    trainer = train if trainer is None else trainer

    def observer(name: str, point: Point, model: nn.Module) -> None:
        for tell in observers:
            tell(name, point, model)

    runs = []
    for name, settings in contenders.items():
        run = checkpoint.run_of(name, settings)
        if run is None:
            trials: list[Trial] = []
            if settings.lr is None:
                trials = sweep(
                    problem,
                    name,
                    settings,
                    seed=seed,
                    budget=budget,
                    trainer=trainer,
                    checkpoint=checkpoint,
                    watch=watch,
                )
                best = min(trials, key=lambda trial: trial.score if math.isfinite(trial.score) else math.inf)
                settings = dataclasses.replace(cast(Any, settings), lr=best.lr)
                tried = ", ".join(f"{trial.lr:g}: {trial.score:.4g}" for trial in trials)
                say(f"{name}: learning rates on seed {seed + _SWEEP_SEED_OFFSET}: {tried}; takes {best.lr:g}")
            task = Task(problem, name, settings, seed=seed, budget=budget, observer=observer)
            run = trainer(task, watch=_both(watch, checkpoint.watch), state=checkpoint.state_of(name))
            run = dataclasses.replace(run, sweep=tuple(trials))
            checkpoint.add_run(run)
        score = run.final.losses[problem.score]
        say(f"{name}: {run.final.step} steps in {run.final.seconds:.1f} s to {score:.4g}")
        runs.append(run)
    return runs


def _both(first: Watch | None, second: Watch) -> Watch:
    def watch(training: Training) -> None:
        if first is not None:
            first(training)
        second(training)

    return watch
