"""Adam, and AdamW."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import nn
from torch.optim import Optimizer

from experiments.optimizers.base import CommonSettings
from experiments.problems import Problem


@dataclass(frozen=True, kw_only=True)
class AdamSettings(CommonSettings):
    """torch.optim.Adam (Kingma & Ba 2015), its learning rate found by a sweep.

    Attributes:
        lr: Learning rate; None: the best of `lr_grid`.
        batch_size: Rows a step.
        weight_decay: Coefficient of the L2 penalty.
    """

    lr_grid: ClassVar[tuple[float, ...]] = (1e-3, 3e-3, 1e-2, 3e-2)

    lr: float | None = None
    batch_size: int = 1024
    weight_decay: float = 0.0

    @classmethod
    def for_problem(cls, problem: Problem, **changes: Any) -> Self:
        """Give the defaults.

        Args:
            problem: What is to be solved.
            **changes: Settings that are to differ.

        Returns:
            Batches of 1024 in two dimensions, where the target is noisy; of 256 above. In hundreds of dimensions
            Adam needs a warm-up: without one it is a weak rival.
        """
        return cls(**first_order_defaults(problem) | changes)

    def build(self, parameters: Iterable[nn.Parameter], seed: int) -> Optimizer:
        """Build the optimizer.

        Args:
            parameters: What it trains.
            seed: Not used: Adam draws nothing.

        Returns:
            The optimizer.

        Raises:
            ValueError: If the learning rate has not been found yet.
        """
        return torch.optim.Adam(parameters, lr=found(self.lr), weight_decay=self.weight_decay)


@dataclass(frozen=True, kw_only=True)
class AdamWSettings(AdamSettings):
    """torch.optim.AdamW (Loshchilov & Hutter 2019): Adam, its weight decay apart from the gradient's moments.

    Attributes:
        weight_decay: Share of the weights that a step of rate 1 takes away; torch's default.
    """

    weight_decay: float = 1e-2

    def build(self, parameters: Iterable[nn.Parameter], seed: int) -> Optimizer:
        """Build the optimizer.

        Args:
            parameters: What it trains.
            seed: Not used: AdamW draws nothing.

        Returns:
            The optimizer.

        Raises:
            ValueError: If the learning rate has not been found yet.
        """
        return torch.optim.AdamW(parameters, lr=found(self.lr), weight_decay=self.weight_decay)


def first_order_defaults(problem: Problem) -> dict[str, Any]:
    """Give the batch and the warm-up that suit Adam and its relatives.

    Args:
        problem: What is to be solved.

    Returns:
        Values by name of the setting.
    """
    batch_size = 1024 if problem.dim == 2 else 256
    if problem.rows is not None:
        batch_size = min(batch_size, problem.rows)
    return {"batch_size": batch_size, "warmup": 0.1 if problem.dim > 256 else 0.0}


def found(lr: float | None) -> float:
    """Return a learning rate that is there.

    Args:
        lr: The learning rate, or None where it is still to be found.

    Returns:
        The learning rate.

    Raises:
        ValueError: If it is None.
    """
    if lr is None:
        raise ValueError("lr=None has no value to train with: sweep over lr_grid first")
    return lr
