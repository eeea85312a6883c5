"""The damped Gauss-Newton step from the Gram matrix of a few rows' Jacobian."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from torch import nn
from torch.optim import Optimizer

from experiments.optimizers.base import CommonSettings, check_curvature_rows
from experiments.problems import Problem

_ROWS = 512  # of the Jacobian, which the curvature's samples times their outputs make: its Gram matrix is so wide


@dataclass(frozen=True, kw_only=True)
class GramSettings(CommonSettings):
    """`GramCholesky` ("minSR", the dual of the dense method) on a part of the batch: exact steps without iterations.

    Attributes:
        lr: Length of a step, in units of the Newton step.
        damping: λ of the first step.
        minimum_damping: The floor under λ: a few rows say nothing of most directions.
        batch_size: Rows of the gradient.
        curvature_batch: Rows of the curvature; the Gram matrix is that times the outputs a row wide.
        weight_decay: Coefficient of the L2 penalty.
    """

    lr_grid: ClassVar[tuple[float, ...]] = ()

    lr: float = 1.0
    damping: float = 0.3
    minimum_damping: float = 1e-2
    batch_size: int = 1024
    curvature_batch: int = 256
    weight_decay: float = 0.0

    @classmethod
    def for_problem(cls, problem: Problem, **changes: Any) -> Self:
        """Give the defaults.

        Args:
            problem: What is to be solved.
            **changes: Settings that are to differ.

        Returns:
            As many rows of curvature as make a Gram matrix of 512, which takes milliseconds.
        """
        batch = cls.batch_size if problem.rows is None else min(cls.batch_size, problem.rows)
        batch = changes.get("batch_size", batch)
        return cls(**{"batch_size": batch, "curvature_batch": min(batch, max(1, _ROWS // problem.outputs))} | changes)

    def build(self, parameters: Iterable[nn.Parameter], seed: int) -> Optimizer:
        """Build the optimizer.

        Args:
            parameters: What it trains.
            seed: Passed on; this configuration draws nothing.

        Returns:
            The optimizer.
        """
        from hessfree import GramCholesky, HessianFree, Identity, LevenbergMarquardt

        return HessianFree(
            parameters,
            lr=self.lr,
            damping=self.damping,
            weight_decay=self.weight_decay,
            solver=GramCholesky(),
            preconditioner=Identity(),
            damping_rule=LevenbergMarquardt(every=5, minimum=self.minimum_damping),
            curvature_batch=self.curvature_batch,
            seed=seed,
        )

    def check(self, parameters: int) -> None:
        """Accept every network: memory grows only linearly with it.

        Args:
            parameters: Number of parameters.

        Raises:
            UsageError: If the curvature asks for more rows than there are.
        """
        check_curvature_rows(self.curvature_batch, self.batch_size)
