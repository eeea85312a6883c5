"""L-BFGS."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import nn
from torch.optim import Optimizer

from experiments.environment import UsageError
from experiments.optimizers.base import CommonSettings
from experiments.problems import Problem


@dataclass(frozen=True, kw_only=True)
class LBFGSSettings(CommonSettings):
    """torch.optim.LBFGS with the strong Wolfe line search, on all rows: for fixed rows only.

    Attributes:
        lr: First trial length of the line search.
        batch_size: Rows a step: all there are.
        max_iterations: Iterations a step; the clock is read between steps.
        history: Pairs of differences that are kept.
    """

    lr_grid: ClassVar[tuple[float, ...]] = ()

    lr: float = 1.0
    batch_size: int
    max_iterations: int = 20
    history: int = 50
    final_length: float = 1.0

    @classmethod
    def for_problem(cls, problem: Problem, **changes: Any) -> Self:
        """Give the defaults.

        Args:
            problem: What is to be solved.
            **changes: Settings that are to differ.

        Returns:
            All rows a step.

        Raises:
            UsageError: If the problem has no fixed rows: differences of gradients of different rows are noise.
        """
        if problem.rows is None:
            raise UsageError(
                f"lbfgs needs fixed rows, and {problem.name} draws new ones for ever; leave it out: "
                f"--optimizers hessfree adam"
            )
        return cls(**{"batch_size": problem.rows} | changes)

    def build(self, parameters: Iterable[nn.Parameter], seed: int) -> Optimizer:
        """Build the optimizer.

        Args:
            parameters: What it trains.
            seed: Not used: L-BFGS draws nothing.

        Returns:
            The optimizer.
        """
        return torch.optim.LBFGS(
            parameters,
            lr=self.lr,
            max_iter=self.max_iterations,
            history_size=self.history,
            line_search_fn="strong_wolfe",
        )
