"""What a run leaves: the points of its curve, its settings, its end."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from experiments.optimizers import Settings

_POINTS = 25  # evaluations a run, if its steps are short enough
_FIRST_POINT = 0.01  # of the budget


@dataclass(frozen=True)
class Budget:
    """How long a run goes on: for so many seconds of training, or for so many steps.

    With steps nothing hangs on a clock: the same seed gives the same losses to the last bit, on the same machine.

    Attributes:
        seconds: Seconds; infinite where steps are counted.
        steps: Steps; None: seconds are counted.
    """

    seconds: float = math.inf
    steps: int | None = None

    def __post_init__(self) -> None:
        """Check that one of them is given, and not both.

        Raises:
            ValueError: If not, or if it is not positive.
        """
        counted = self.seconds if self.steps is None else self.steps
        if (self.steps is not None and math.isfinite(self.seconds)) or not (math.isfinite(counted) and counted > 0):
            raise ValueError(f"{self} is no budget; give a positive number of seconds or of steps, and not both")

    def fraction(self, seconds: float, steps: int) -> float:
        """Give the share that is spent.

        Args:
            seconds: Seconds of training.
            steps: Steps made.

        Returns:
            From 0; 1 or more at the end.
        """
        return seconds / self.seconds if self.steps is None else steps / self.steps

    def share(self, part: float) -> "Budget":
        """Give a part of it.

        Args:
            part: Which.

        Returns:
            The part, at least one step.
        """
        return Budget(part * self.seconds) if self.steps is None else Budget(steps=max(1, round(part * self.steps)))

    def __str__(self) -> str:
        """Say how much it is."""
        return f"{self.seconds:g} s" if self.steps is None else f"{self.steps} steps"


@dataclass(frozen=True)
class Point:
    """The state of a run at one moment.

    Attributes:
        step: Steps made.
        samples: Rows used: those of every loss that the optimizer asked of its closure, counted again each time. Where
            it asks once a step, the rows drawn; L-BFGS asks some 25 times. Replays of `HessianFree` are not counted.
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
        budget_seconds: The seconds it was given; infinite where it was given steps.
        points: From the start to the end, at least two.
        sweep: The learning rates that were tried before, on another seed; their seconds are not in `points`.
        weights: The network at the end, as its `state_dict` has it.
    """

    optimizer: str
    settings: Settings
    seed: int
    budget_seconds: float
    points: tuple[Point, ...]
    sweep: tuple[Trial, ...] = ()
    weights: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def final(self) -> Point:
        """The last point."""
        return self.points[-1]

    @property
    def budget_steps(self) -> int | None:
        """The steps it was given, and made; None where it was given seconds."""
        return None if math.isfinite(self.budget_seconds) else self.final.step

    @property
    def overshoot_seconds(self) -> float:
        """How long the last step went on after the end of the budget."""
        return max(0.0, self.final.seconds - self.budget_seconds)


Observer = Callable[[str, Point, Any], None]  # the optimizer's name, the point, the network; called off the clock


def evaluation_times(total: float) -> list[float]:
    """Give the moments of evaluation, evenly spaced on a logarithmic axis as the plots are.

    Args:
        total: The end, in seconds or in anything else.

    Returns:
        Ascending, from 1 % of the end to the end; the start is evaluated besides.
    """
    return [total * _FIRST_POINT ** (1 - index / (_POINTS - 1)) for index in range(_POINTS)]
