"""The textbook method, which forms its matrix."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from torch import nn
from torch.optim import Optimizer

from experiments.environment import UsageError
from experiments.optimizers.base import CommonSettings
from experiments.problems import Problem


@dataclass(frozen=True, kw_only=True)
class DenseFisherSettings(CommonSettings):
    """The textbook step: the whole Gauss-Newton (Fisher) matrix formed and factorised at every step.

    Attributes:
        lr: Length of a step, in units of the Newton step.
        damping: λ of the first step.
        batch_size: Rows of gradient and curvature; the Jacobian has `batch_size` times D rows.
        weight_decay: Coefficient of the L2 penalty.
    """

    lr_grid: ClassVar[tuple[float, ...]] = ()
    largest: ClassVar[int] = 20_000  # parameters: 1.6 GB a copy of the matrix

    lr: float = 1.0
    damping: float = 0.3
    batch_size: int = 256
    weight_decay: float = 0.0

    @classmethod
    def for_problem(cls, problem: Problem, **changes: Any) -> Self:
        """Give the defaults.

        Args:
            problem: What is to be solved.
            **changes: Settings that are to differ.

        Returns:
            Batches small enough to form the matrix in seconds.
        """
        return cls(**{"batch_size": 256 if problem.dim == 2 else 32} | changes)

    def build(self, parameters: Iterable[nn.Parameter], seed: int) -> Optimizer:
        """Build the optimizer.

        Args:
            parameters: What it trains.
            seed: Passed on; this configuration draws nothing.

        Returns:
            The optimizer.
        """
        from hessfree import DenseCholesky, HessianFree, Identity, LevenbergMarquardt

        return HessianFree(
            parameters,
            lr=self.lr,
            damping=self.damping,
            weight_decay=self.weight_decay,
            solver=DenseCholesky(),
            preconditioner=Identity(),
            # Every step, as the dense method is always described: it makes a handful of steps in all.
            damping_rule=LevenbergMarquardt(every=1),
            seed=seed,
        )

    def check(self, parameters: int) -> None:
        """Refuse networks whose matrix does not fit.

        Args:
            parameters: Number of parameters.

        Raises:
            UsageError: If there are too many.
        """
        if parameters > self.largest:
            raise UsageError(
                f"dense-fisher needs a {parameters} x {parameters} matrix ({4e-9 * parameters**2:.0f} GB); "
                f"leave it out: --optimizers hessfree adam"
            )
