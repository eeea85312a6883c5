"""What the comparison asks of an optimizer's settings, and the step lengths that all of them share."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, Self

from torch import nn
from torch.optim import Optimizer

from experiments.environment import UsageError
from experiments.problems import Problem


class Settings(Protocol):
    """What the comparison asks of the settings of an optimizer: a frozen dataclass, of plain numbers if it can be."""

    __dataclass_fields__: ClassVar[dict[str, Any]]
    lr_grid: ClassVar[tuple[float, ...]]

    @property
    def lr(self) -> float | None:
        """The learning rate; None: found by a sweep over `lr_grid`."""

    @property
    def batch_size(self) -> int:
        """Rows a step."""

    @classmethod
    def for_problem(cls, problem: Problem, **changes: Any) -> Self:
        """Give the defaults for a problem, with changes."""

    def build(self, parameters: Iterable[nn.Parameter], seed: int) -> Optimizer:
        """Build the optimizer."""

    def step_length(self, fraction: float) -> float:
        """Give the factor on the learning rate after this share of the budget."""

    def check(self, parameters: int) -> None:
        """Raise UsageError where a network of this many parameters is out of reach."""


@dataclass(frozen=True, kw_only=True)
class CommonSettings:
    """The settings that every optimizer has besides its own: how long its steps are as the budget is spent.

    Where rows are never used twice the gradient stays noisy to the end, and a constant step would leave every optimizer
    wandering at a height set by its learning rate; the cosine averages that noise out. Second-order steps on fixed
    rows have no such noise, and keep their length.

    Attributes:
        warmup: Share of the budget over which the length rises linearly to its full value.
        final_length: Length at the end of the budget, as a share of the full one: 0 is a cosine to zero, 1 constant.
    """

    warmup: float = 0.0
    final_length: float = 0.0

    def step_length(self, fraction: float) -> float:
        """Give the factor on the learning rate: a linear rise, times a cosine from 1 to `final_length`.

        Args:
            fraction: Share of the budget that is spent.

        Returns:
            The factor, in [0, 1]; beyond the end of the budget, that at its end. The first step of a warm-up is not
            lost: it has a hundredth of the full length.
        """
        cosine = 0.5 * (1 + math.cos(math.pi * min(fraction, 1.0)))
        rise = min(1.0, max(fraction / self.warmup, 0.01)) if self.warmup else 1.0
        return rise * (self.final_length + (1 - self.final_length) * cosine)

    def check(self, parameters: int) -> None:
        """Accept every network: memory grows only linearly with it.

        Args:
            parameters: Number of parameters.
        """


def check_curvature_rows(curvature: int | None, batch_size: int) -> None:
    """Check that the rows of the curvature can be taken from a batch.

    Args:
        curvature: Rows of the curvature; None: all of the batch.
        batch_size: Rows of the batch.

    Raises:
        UsageError: If the curvature asks for more rows than there are.
    """
    if curvature is not None and curvature > batch_size:
        raise UsageError(
            f"--set hessfree.curvature_batch={curvature} is more than the batch of {batch_size} rows; give at most "
            f"that, or raise hessfree.batch_size"
        )
