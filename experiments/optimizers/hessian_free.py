"""HessianFree: its recipe for streaming data, its recipe for fixed data, and any other."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from torch import nn
from torch.optim import Optimizer

from experiments.environment import UsageError
from experiments.optimizers.base import CommonSettings
from experiments.problems import Problem


@dataclass(frozen=True, kw_only=True)
class HessianFreeSettings(CommonSettings):
    """`HessianFree.stochastic`: conjugate gradients, preconditioned by K-FAC, on a part of the gradient's batch.

    Attributes:
        lr: Length of a step, in units of the Newton step.
        damping: λ of the first step.
        batch_size: Rows of the gradient.
        curvature_batch: Rows of the curvature; None: an eighth of the gradient's, at least 256.
        cg_iterations: Conjugate-gradient iterations a step.
        minimum_damping: The floor under λ: the noisier the target, the higher.
        weight_decay: Coefficient of the L2 penalty.
    """

    lr_grid: ClassVar[tuple[float, ...]] = ()

    lr: float = 1.0
    damping: float = 0.3
    batch_size: int = 8192
    curvature_batch: int | None = None
    cg_iterations: int = 3
    minimum_damping: float = 1e-3
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        """Decide the curvature's rows where they are left open, so that the record shows them."""
        if self.curvature_batch is None:
            # Assigning to a frozen dataclass from within needs this detour.
            object.__setattr__(self, "curvature_batch", min(self.batch_size, max(256, self.batch_size // 8)))

    @classmethod
    def for_problem(cls, problem: Problem, **changes: Any) -> Self:
        """Give the defaults.

        Args:
            problem: What is to be solved.
            **changes: Settings that are to differ.

        Returns:
            Large batches and a high floor in two dimensions, where the target is noisy; the opposite above.
        """
        if problem.dim == 2:
            return cls(**changes)
        quiet = {"damping": 0.1, "batch_size": 1024 if problem.dim <= 64 else 512, "minimum_damping": 1e-6}
        return cls(**quiet | changes)

    def build(self, parameters: Iterable[nn.Parameter], seed: int) -> Optimizer:
        """Build the optimizer.

        Args:
            parameters: What it trains.
            seed: Of the cotangents that K-FAC samples.

        Returns:
            The optimizer.
        """
        from hessfree import CG, HessianFree, LevenbergMarquardt

        return HessianFree.stochastic(
            parameters,
            lr=self.lr,
            damping=self.damping,
            weight_decay=self.weight_decay,
            solver=CG(max_iterations=self.cg_iterations),
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
        if self.curvature_batch is not None and self.curvature_batch > self.batch_size:
            raise UsageError(
                f"--set hessfree.curvature_batch={self.curvature_batch} is more than the batch of {self.batch_size} "
                f"rows; give at most that, or raise hessfree.batch_size"
            )


@dataclass(frozen=True, kw_only=True)
class FullBatchSettings(CommonSettings):
    """`HessianFree.full_batch`: every step sees all rows, and keeps its full length.

    Attributes:
        lr: Length of a step, in units of the Newton step.
        damping: λ of the first step.
        batch_size: Rows a step: all there are.
        samples: Rows that the Woodbury preconditioner takes exactly.
        weight_decay: Coefficient of the L2 penalty.
    """

    lr_grid: ClassVar[tuple[float, ...]] = ()

    lr: float = 1.0
    damping: float = 0.3
    batch_size: int
    samples: int = 256
    weight_decay: float = 0.0
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
            UsageError: If the problem has no fixed rows.
        """
        if problem.rows is None:
            raise UsageError(f"the full-batch recipe needs fixed rows, and {problem.name} draws new ones for ever")
        return cls(**{"batch_size": problem.rows} | changes)

    def build(self, parameters: Iterable[nn.Parameter], seed: int) -> Optimizer:
        """Build the optimizer.

        Args:
            parameters: What it trains.
            seed: Of the cotangents that the preconditioner samples.

        Returns:
            The optimizer.
        """
        from hessfree import HessianFree
        from hessfree.preconditioners import Woodbury

        return HessianFree.full_batch(
            parameters,
            lr=self.lr,
            damping=self.damping,
            weight_decay=self.weight_decay,
            preconditioner=Woodbury(samples=self.samples),
            seed=seed,
        )


@dataclass(frozen=True, kw_only=True)
class RecipeSettings(CommonSettings):
    """Any configuration of HessianFree, for ablations.

    Pickled where `recipe` is: `functools.partial(HessianFree.stochastic, solver=CG(max_iterations=1))` is.

    Attributes:
        recipe: Called as `recipe(parameters, lr=..., seed=...)`.
        lr: Length of a step, in units of the solver's direction.
        batch_size: Rows a step.
    """

    lr_grid: ClassVar[tuple[float, ...]] = ()

    recipe: Callable[..., Optimizer]
    lr: float = 1.0
    batch_size: int = 4096

    @classmethod
    def for_problem(cls, problem: Problem, **changes: Any) -> Self:
        """Give the defaults.

        Args:
            problem: What is to be solved.
            **changes: Settings that are to differ; `recipe` among them.

        Returns:
            All rows and steps of constant length where rows are fixed; else the batches of `HessianFreeSettings`.
        """
        if problem.rows is not None:
            return cls(**{"batch_size": problem.rows, "final_length": 1.0} | changes)
        return cls(**{"batch_size": HessianFreeSettings.for_problem(problem).batch_size} | changes)

    def build(self, parameters: Iterable[nn.Parameter], seed: int) -> Optimizer:
        """Build the optimizer.

        Args:
            parameters: What it trains.
            seed: Of everything that the optimizer draws.

        Returns:
            The optimizer.
        """
        return self.recipe(parameters, lr=self.lr, seed=seed)
