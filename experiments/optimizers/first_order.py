"""What the settings of optimizers that look at gradients alone share."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from torch import nn
from torch.optim import Optimizer

from experiments.environment import require_extras
from experiments.optimizers.base import CommonSettings
from experiments.problems import Problem


@dataclass(frozen=True, kw_only=True)
class FirstOrderSettings(CommonSettings, ABC):
    """An optimizer that costs little more a step than its gradient, its learning rate found by a sweep.

    Attributes:
        lr_grid: The learning rates that the sweep tries.
        package: That the optimizer is of; None: torch.
        lr: Learning rate; None: the best of `lr_grid`.
        batch_size: Rows a step.
        weight_decay: Coefficient of the L2 penalty.
    """

    lr_grid: ClassVar[tuple[float, ...]] = (1e-3, 3e-3, 1e-2, 3e-2)
    package: ClassVar[str | None] = None

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
        batch_size = 1024 if problem.dim == 2 else 256
        if problem.rows is not None:
            batch_size = min(batch_size, problem.rows)
        return cls(**{"batch_size": batch_size, "warmup": 0.1 if problem.dim > 256 else cls.warmup} | changes)

    def build(self, parameters: Iterable[nn.Parameter], seed: int) -> Optimizer:
        """Build the optimizer.

        Args:
            parameters: What it trains.
            seed: Not used: none of these draws anything.

        Returns:
            The optimizer.

        Raises:
            ValueError: If the learning rate has not been found yet.
        """
        if self.lr is None:
            raise ValueError("lr=None has no value to train with: sweep over lr_grid first")
        return self._at(self.lr, parameters)

    @abstractmethod
    def _at(self, lr: float, parameters: Iterable[nn.Parameter]) -> Optimizer:
        """Build the optimizer with this learning rate."""

    def check(self, parameters: int) -> None:
        """Check that the package is there; every network will do.

        Args:
            parameters: Number of parameters.

        Raises:
            UsageError: If the package is not installed.
        """
        if self.package is not None:
            require_extras([self.package])
