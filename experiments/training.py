"""One optimizer training one network for a number of seconds.

What counts as an optimizer's time: building it (with the import of its package), drawing its batches, its steps. What
does not: evaluation and logging. The budget is checked between steps, so a run may overshoot by one step; the overshoot
is part of the result.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from experiments.environment import synchronize
from experiments.optimizers import Settings
from experiments.problems import Problem

_POINTS = 25  # evaluations a run, if its steps are short enough
_FIRST_POINT = 0.01  # of the budget


@dataclass(frozen=True)
class Point:
    """The state of a run at one moment.

    Attributes:
        step: Steps made.
        samples: Rows used.
        seconds: Seconds of training.
        train_loss: Mean loss of the batches since the previous point; at the start, of the first batch.
        losses: What the problem's `evaluate` says of the network, on rows that are fixed.
        internals: What the optimizer reports of its last step, if it does.
    """

    step: int
    samples: int
    seconds: float
    train_loss: float
    losses: dict[str, float]
    internals: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Trial:
    """One learning rate of a sweep.

    Attributes:
        lr: The learning rate.
        score: Where it ended, in the score of the problem; NaN if it diverged.
    """

    lr: float
    score: float


@dataclass(frozen=True)
class Run:
    """What one optimizer did.

    Attributes:
        optimizer: Its name.
        settings: Its settings, with the learning rate that a sweep found.
        seed: Fixes initial weights and data.
        budget_seconds: The seconds it was given.
        points: From the start to the end, at least two.
        sweep: The learning rates that were tried before, on another seed; their seconds are not in `points`.
    """

    optimizer: str
    settings: Settings
    seed: int
    budget_seconds: float
    points: tuple[Point, ...]
    sweep: tuple[Trial, ...] = ()

    @property
    def final(self) -> Point:
        """The last point."""
        return self.points[-1]

    @property
    def overshoot_seconds(self) -> float:
        """How long the last step went on after the end of the budget."""
        return max(0.0, self.final.seconds - self.budget_seconds)


Observer = Callable[[str, Point], None]  # called with the optimizer's name at each point, off the clock


class Stopwatch:
    """Adds up the seconds spent inside its `with` blocks, accelerator included."""

    def __init__(self, device: torch.device) -> None:
        """Start at zero.

        Args:
            device: What to wait for before the clock is read.
        """
        self.seconds = 0.0
        self._device = device
        self._started = 0.0

    def __enter__(self) -> None:
        """Let the clock run."""
        self._started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        """Wait for queued work, then stop the clock."""
        synchronize(self._device)
        self.seconds += time.perf_counter() - self._started


def evaluation_times(budget_seconds: float) -> list[float]:
    """Give the moments of evaluation, evenly spaced on a logarithmic axis as the plots are.

    Args:
        budget_seconds: The end.

    Returns:
        Ascending seconds from 1 % of the budget to all of it; the start is evaluated besides.
    """
    return [budget_seconds * _FIRST_POINT ** (1 - index / (_POINTS - 1)) for index in range(_POINTS)]


class _Training:
    """One run in progress: the model, its rows, its clock, and the points recorded so far."""

    def __init__(self, problem: Problem, name: str, settings: Settings, seed: int, observer: Observer | None) -> None:
        self.problem = problem
        self.name = name
        self.settings = settings
        self.observer = observer
        self.model = problem.initial_model(seed)
        self.points: list[Point] = []
        self.steps = 0
        self.loss_sum = 0.0
        self.losses = 0
        # Off the clock: the loss at the start is that of the rows which the first step will draw again.
        self.add_loss(problem.loss(self.model, problem.stream(seed).draw(settings.batch_size)))
        self.clock = Stopwatch(problem.device)
        with self.clock:
            self.stream = problem.stream(seed)
            self.optimizer = settings.build(self.model.parameters(), seed)
            self.lrs = [group["lr"] for group in self.optimizer.param_groups]

    def step(self, fraction: float) -> None:
        """Make one step on new rows, with step lengths for this share of the budget."""
        optimizer = self.optimizer
        with self.clock:
            for group, lr in zip(optimizer.param_groups, self.lrs, strict=True):
                group["lr"] = lr * self.settings.step_length(fraction)
            batch = self.stream.draw(self.settings.batch_size)

            def closure() -> Tensor:
                optimizer.zero_grad()
                loss = self.problem.loss(self.model, batch)
                loss.backward()
                return loss

            # torch annotates closures as returning floats; its optimizers pass tensors through.
            loss = cast(Callable[[Callable[[], Tensor]], Tensor], optimizer.step)(closure)
        self.steps += 1
        self.add_loss(loss)

    def add_loss(self, loss: Tensor) -> None:
        self.loss_sum += loss.item()
        self.losses += 1

    def record(self) -> None:
        """Evaluate, off the clock."""
        point = Point(
            step=self.steps,
            samples=self.steps * self.settings.batch_size,
            seconds=self.clock.seconds,
            train_loss=self.loss_sum / self.losses if self.losses else math.nan,
            losses=self.problem.evaluate(self.model),
            internals=_internals(self.optimizer),
        )
        self.loss_sum, self.losses = 0.0, 0
        self.points.append(point)
        if self.observer is not None:
            self.observer(self.name, point)


def _internals(optimizer: Optimizer) -> dict[str, float]:
    """The numbers of the last step's report, where an optimizer keeps one."""
    report: Any = getattr(optimizer, "last_step", None)
    return {} if report is None else report.scalars("optimizer/")


def train(
    problem: Problem,
    name: str,
    settings: Settings,
    *,
    seed: int,
    budget_seconds: float,
    moments: Sequence[float] | None = None,
    observer: Observer | None = None,
) -> Run:
    """Train one network for a time.

    Args:
        problem: What is solved.
        name: What to call the optimizer.
        settings: Its settings, with a learning rate.
        seed: Fixes initial weights and data.
        budget_seconds: Seconds of training, evaluation not counted.
        moments: Ascending seconds at which to evaluate, besides the start and the end; None: `evaluation_times`.
        observer: Told of every point.

    Returns:
        The run.
    """
    training = _Training(problem, name, settings, seed, observer)
    training.record()
    due = evaluation_times(budget_seconds) if moments is None else list(moments)
    while (elapsed := training.clock.seconds) < budget_seconds or training.steps == 0:
        # The first step has full length even where building the optimizer took more than a tiny budget.
        training.step(elapsed / budget_seconds if training.steps else 0.0)
        elapsed = training.clock.seconds
        if elapsed >= budget_seconds or (due and elapsed >= due[0]):
            training.record()
            due = [moment for moment in due if moment > elapsed]
    return Run(name, settings, seed, budget_seconds, tuple(training.points))
