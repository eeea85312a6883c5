"""Stochastic gradient descent with Nesterov's momentum."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import nn
from torch.optim import Optimizer

from experiments.optimizers.adam import first_order_defaults, found
from experiments.optimizers.base import CommonSettings
from experiments.problems import Problem


@dataclass(frozen=True, kw_only=True)
class SGDSettings(CommonSettings):
    """torch.optim.SGD with Nesterov's momentum (Sutskever et al. 2013), its learning rate found by a sweep.

    Attributes:
        lr: Learning rate; None: the best of `lr_grid`.
        batch_size: Rows a step.
        momentum: Share of the last step that goes into the next.
        weight_decay: Coefficient of the L2 penalty.
    """

    lr_grid: ClassVar[tuple[float, ...]] = (3e-3, 1e-2, 3e-2, 1e-1)

    lr: float | None = None
    batch_size: int = 1024
    momentum: float = 0.9
    weight_decay: float = 0.0

    @classmethod
    def for_problem(cls, problem: Problem, **changes: Any) -> Self:
        """Give the defaults.

        Args:
            problem: What is to be solved.
            **changes: Settings that are to differ.

        Returns:
            Batches and warm-up as for Adam.
        """
        return cls(**first_order_defaults(problem) | changes)

    def build(self, parameters: Iterable[nn.Parameter], seed: int) -> Optimizer:
        """Build the optimizer.

        Args:
            parameters: What it trains.
            seed: Not used: it draws nothing.

        Returns:
            The optimizer.

        Raises:
            ValueError: If the learning rate has not been found yet.
        """
        return torch.optim.SGD(
            parameters,
            lr=found(self.lr),
            momentum=self.momentum,
            nesterov=self.momentum > 0,
            weight_decay=self.weight_decay,
        )
