"""Shampoo: gradients between inverse roots of their two second-moment matrices."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from torch import nn
from torch.optim import Optimizer

from experiments.environment import require_extras
from experiments.optimizers.adam import first_order_defaults, found
from experiments.optimizers.base import CommonSettings
from experiments.problems import Problem

_GRAFT_RMSPROP = 3  # pytorch_optimizer's LayerWiseGrafting.RMSPROP: not exported, and an IntEnum


@dataclass(frozen=True, kw_only=True)
class ShampooSettings(CommonSettings):
    """Shampoo (Gupta et al. 2018; Anil et al. 2020, arXiv 2002.09018) of pytorch_optimizer, its rate found by a sweep.

    Its steps take their length, layer by layer, from RMSProp ("grafting"), without which no rate suits all layers, and
    their direction from inverse roots that are renewed every few steps. The other settings are the package's.

    Attributes:
        lr: Learning rate; None: the best of `lr_grid`.
        batch_size: Rows a step.
        weight_decay: Coefficient of the L2 penalty.
        every: Steps between updates of the inverse roots.
        widest: Larger matrices are preconditioned in blocks of this size.
    """

    lr_grid: ClassVar[tuple[float, ...]] = (1e-3, 3e-3, 1e-2, 3e-2)

    lr: float | None = None
    batch_size: int = 1024
    weight_decay: float = 0.0
    every: int = 10
    widest: int = 512

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
            seed: Not used: Shampoo draws nothing.

        Returns:
            The optimizer.

        Raises:
            ValueError: If the learning rate has not been found yet.
        """
        from pytorch_optimizer import ScalableShampoo

        return ScalableShampoo(
            parameters,
            lr=found(self.lr),
            weight_decay=self.weight_decay,
            moving_average_for_momentum=True,
            preconditioning_compute_steps=self.every,
            block_size=self.widest,
            graft_type=_GRAFT_RMSPROP,
        )

    def check(self, parameters: int) -> None:
        """Check that the package is there; every network will do.

        Args:
            parameters: Number of parameters.

        Raises:
            UsageError: If the package is not installed.
        """
        require_extras(["pytorch_optimizer"])
