"""SOAP: Adam in the eigenbases of Shampoo's factors."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from torch import nn
from torch.optim import Optimizer

from experiments.environment import require_extras
from experiments.optimizers.adam import first_order_defaults, found
from experiments.optimizers.base import CommonSettings
from experiments.problems import Problem


@dataclass(frozen=True, kw_only=True)
class SOAPSettings(CommonSettings):
    """SOAP (Vyas et al. 2025, arXiv 2409.11321) of the package pytorch_optimizer, its learning rate found by a sweep.

    Of the packages that have it this one adds the least to a step: on a ToyMLP in two dimensions, 256 rows, one
    thread, 0.8 ms to Adam's 1.7, where heavyball's adds 7.9. The other settings are the paper's.

    Attributes:
        lr: Learning rate; None: the best of `lr_grid`.
        batch_size: Rows a step.
        weight_decay: Coefficient of the decoupled weight decay.
        widest: A side of a weight matrix that is wider is left as it is: one-sided SOAP. On both sides of a matrix of
            785 columns its QR would make the step four times as long (28 ms for 7.6).
        every: Steps between updates of the eigenbases.
    """

    lr_grid: ClassVar[tuple[float, ...]] = (1e-3, 3e-3, 1e-2, 3e-2)

    lr: float | None = None
    batch_size: int = 1024
    weight_decay: float = 0.0
    widest: int = 512
    every: int = 10

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
            seed: Not used: SOAP draws nothing.

        Returns:
            The optimizer.

        Raises:
            ValueError: If the learning rate has not been found yet.
        """
        from pytorch_optimizer import SOAP

        return SOAP(
            parameters,
            lr=found(self.lr),
            weight_decay=self.weight_decay,
            precondition_frequency=self.every,
            max_precondition_dim=self.widest,
        )

    def check(self, parameters: int) -> None:
        """Check that the package is there; every network will do.

        Args:
            parameters: Number of parameters.

        Raises:
            UsageError: If the package is not installed.
        """
        require_extras(["pytorch_optimizer"])
