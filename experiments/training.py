"""One optimizer training one network for a number of seconds, or of steps.

What counts as an optimizer's time: building it (with the import of its package where nothing imported it before),
drawing its batches, its steps. What does not: evaluation, logging, checkpoints. The budget is checked between steps, so
a run may overshoot by one step; the overshoot is part of the result.

What counts as its samples: the rows of every loss that it asks of the closure, see `Training.loss`.
"""

import dataclasses
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from experiments.environment import synchronize
from experiments.optimizers import Settings
from experiments.problems import Problem
from experiments.records import Budget, Observer, Point, Run, Trial, evaluation_times

__all__ = [
    "Budget",
    "Observer",
    "Point",
    "Run",
    "Stopwatch",
    "Task",
    "Training",
    "Trial",
    "evaluation_times",
    "last_point",
    "train",
]


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


@dataclass(frozen=True)
class Task:
    """What one optimizer is to do.

    Attributes:
        problem: What is solved.
        name: What to call the optimizer.
        settings: Its settings, with a learning rate.
        seed: Fixes initial weights and data.
        budget: When to end.
        moments: Ascending moments at which to evaluate, in the budget's own measure, besides the start and the end;
            None: `evaluation_times`.
        observer: Told of every point.
    """

    problem: Problem
    name: str
    settings: Settings
    _: KW_ONLY
    seed: int
    budget: Budget
    moments: Sequence[float] | None = None
    observer: Observer | None = None


class Training:
    """One run in progress: the model, its rows, its clock, and the points recorded so far.

    Attributes:
        task: What is to be done.
        model: The network.
        optimizer: What trains it.
        steps: Steps made.
        samples: Rows used, as `loss` counts them.
        clock: Counts the seconds of training.
        last_loss: Of the last step's batch; NaN before the first.
    """

    def __init__(self, task: Task) -> None:
        """Make the network and build the optimizer.

        Args:
            task: What is to be done.
        """
        self.task = task
        problem, settings, budget, seed = task.problem, task.settings, task.budget, task.seed
        total = budget.seconds if budget.steps is None else float(budget.steps)
        self._due = [moment / total for moment in (evaluation_times(total) if task.moments is None else task.moments)]
        self.model = problem.initial_model(seed)
        self.points: list[Point] = []
        self.steps = 0
        self.samples = 0
        # A stream of fixed rows gives all there are to whoever asks for more.
        self._rows = settings.batch_size if problem.rows is None else min(settings.batch_size, problem.rows)
        self.last_loss = math.nan
        self._loss_sum, self._losses = 0.0, 0
        # Off the clock: the loss at the start is that of the rows which the first step will draw again.
        self._add_loss(problem.loss(self.model, problem.stream(seed).draw(settings.batch_size)))
        self.clock = Stopwatch(problem.device)
        with self.clock:
            self.stream = problem.stream(seed)
            self.optimizer = settings.build(self.model.parameters(), seed)
            self._lrs = [group["lr"] for group in self.optimizer.param_groups]

    def begin(self, state: dict[str, Any] | None = None) -> None:
        """Evaluate the start, or go on where another run of the same task was.

        Args:
            state: From its `state_dict`; None: at the start.
        """
        if state is None:
            self.record()
        else:
            self.load_state_dict(state)

    @property
    def fraction(self) -> float:
        """The share of the budget that is spent."""
        return self.task.budget.fraction(self.clock.seconds, self.steps)

    @property
    def done(self) -> bool:
        """Whether the budget is spent; one step is made in any case."""
        return self.steps > 0 and self.fraction >= 1

    def draw(self) -> Any:
        """Take the rows of a step."""
        return self.stream.draw(self.task.settings.batch_size)

    def set_step_length(self) -> None:
        """Set the learning rates of the next step."""
        # The first step has full length even where building the optimizer took more than a tiny budget.
        length = self.task.settings.step_length(self.fraction if self.steps else 0.0)
        for group, lr in zip(self.optimizer.param_groups, self._lrs, strict=True):
            group["lr"] = lr * length

    def loss(self, batch: Any) -> Tensor:
        """Evaluate the loss for a closure, and count its rows.

        Every evaluation counts that an optimizer asks for in its own right: most ask for one a step, whose rows are
        those drawn; `torch.optim.LBFGS` asks for some 25 of the same rows, and goes through them as often. What
        `HessianFree` replays of a batch, to test its damping, does not count, no more than its products with the
        curvature: both are in the seconds.

        Args:
            batch: The rows of the step.

        Returns:
            A scalar with its graph.
        """
        if not _is_replaying():
            self.samples += self._rows
        return self.task.problem.loss(self.model, batch)

    def step(self) -> None:
        """Make one step on new rows."""
        optimizer = self.optimizer
        with self.clock:
            self.set_step_length()
            batch = self.draw()

            def closure() -> Tensor:
                optimizer.zero_grad()
                loss = self.loss(batch)
                loss.backward()
                return loss

            # torch annotates closures as returning floats; its optimizers pass tensors through.
            loss = cast(Callable[[Callable[[], Tensor]], Tensor], optimizer.step)(closure)
        self.count(loss)

    def count(self, loss: Tensor) -> None:
        """Take note of a step that was made, off the clock, and evaluate if it is time.

        Args:
            loss: Of its batch.
        """
        self.steps += 1
        self._add_loss(loss)
        self.last_loss = loss.item()
        fraction = self.fraction
        if self.done or (self._due and fraction >= self._due[0]):
            self.record()
            self._due = [moment for moment in self._due if moment > fraction]

    def _add_loss(self, loss: Tensor) -> None:
        self._loss_sum += loss.item()
        self._losses += 1

    def record(self) -> None:
        """Evaluate, off the clock."""
        point = Point(
            step=self.steps,
            samples=self.samples,
            seconds=self.clock.seconds,
            train_loss=self._loss_sum / self._losses if self._losses else math.nan,
            losses=self.task.problem.evaluate(self.model),
            internals=_internals(self.optimizer),
        )
        self._loss_sum, self._losses = 0.0, 0
        self.points.append(point)
        if self.task.observer is not None:
            self.task.observer(self.task.name, point, self.model)

    def run(self) -> Run:
        """Give what there is so far."""
        weights = {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}
        task, points = self.task, tuple(self.points)
        return Run(task.name, task.settings, task.seed, task.budget.seconds, points, weights=weights)

    def state_dict(self) -> dict[str, Any]:
        """Give everything from which the run goes on as if nothing had happened; tensors are the live ones."""
        stream: Any = self.stream
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "stream": stream.state_dict(),
            "random": torch.get_rng_state(),
            "steps": self.steps,
            "samples": self.samples,
            "seconds": self.clock.seconds,
            "losses": (self._loss_sum, self._losses, self.last_loss),
            "due": list(self._due),
            "points": [dataclasses.asdict(point) for point in self.points],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another run of the same problem, settings and seed was.

        Args:
            state: From its `state_dict`.
        """
        stream: Any = self.stream
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        stream.load_state_dict(state["stream"])
        torch.set_rng_state(state["random"])
        self.steps, self.samples, self.clock.seconds = state["steps"], state["samples"], state["seconds"]
        self._loss_sum, self._losses, self.last_loss = state["losses"]
        self._due = list(state["due"])
        self.points = [Point(**point) for point in state["points"]]


def _internals(optimizer: Optimizer) -> dict[str, float]:
    """The numbers of the last step's report, where an optimizer keeps one."""
    report: Any = getattr(optimizer, "last_step", None)
    return {} if report is None else report.scalars("optimizer/")


def last_point(state: dict[str, Any] | None) -> Point | None:
    """Give the last point of a run in progress.

    Args:
        state: From `Training.state_dict`; None: the run has not begun.

    Returns:
        The point; None where there is none yet.
    """
    points = [] if state is None else state["points"]
    return Point(**points[-1]) if points else None


def _is_replaying() -> bool:
    """Whether a `HessianFree` evaluates its batch again."""
    # Not imported here, or its import would be on no optimizer's clock; where nobody has imported it, none replays.
    package = sys.modules.get("hessfree")
    return package is not None and bool(package.is_replaying())


Watch = Callable[[Training], None]  # called after every step, off the clock


def train(task: Task, *, watch: Watch | None = None, state: dict[str, Any] | None = None) -> Run:
    """Train one network for a time.

    Args:
        task: What is to be done.
        watch: Called after every step.
        state: From `Training.state_dict`: where to go on; None: at the start.

    Returns:
        The run.
    """
    training = Training(task)
    training.begin(state)
    while not training.done:
        training.step()
        if watch is not None:
            watch(training)
    return training.run()
