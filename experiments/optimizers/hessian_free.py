"""HessianFree: its recipes for rows that are drawn anew for ever, and any other."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

from torch import nn
from torch.optim import Optimizer

from experiments.environment import UsageError
from experiments.optimizers.base import CommonSettings, check_curvature_rows
from experiments.optimizers.known_inputs import known_data, moments_of_first_layer
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
        every: Iterate at every so many steps only, and reuse the step length between; needs `cg_iterations` of 1.
        omega: Factor on λ, for each step, where the quadratic model predicted well.
        minimum_damping: The floor under λ: the noisier the target, the higher.
        test_every: Steps between tests of λ, each of which evaluates the loss once more.
        power: Precondition by K-FAC to the power −`power`.
        update_every: Steps between updates of K-FAC.
        warmup_updates: So many updates of K-FAC, the first ones, are made at every step.
        weight_decay: Coefficient of the L2 penalty.
        data: Name of the data set, whose moments the first layer's input factor has; None: it is learned.
    """

    lr_grid: ClassVar[tuple[float, ...]] = ()

    lr: float = 1.0
    damping: float = 0.3
    batch_size: int = 8192
    curvature_batch: int | None = None
    cg_iterations: int = 3
    every: int = 1
    omega: float = 0.8
    minimum_damping: float = 1e-3
    test_every: int = 5
    power: float = 1.0
    update_every: int = 5
    warmup_updates: int = 3
    weight_decay: float = 0.0
    data: str | None = field(default=None, repr=False)

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
            Large batches and a high floor in two dimensions, where the target is noisy; the opposite above. In
            hundreds of dimensions, where cheap steps are what counts: one iteration at every fourth step on few rows,
            factors that rest once they are known, and the first layer's taken from the data.
        """
        if problem.dim == 2:
            return cls(**changes)
        if problem.dim <= 256:
            return cls(**{"damping": 0.1, "batch_size": 1024, "minimum_damping": 1e-6} | changes)
        many: dict[str, Any] = {
            "damping": 0.1,
            "batch_size": 512,
            "curvature_batch": min(64, changes.get("batch_size", 512)),
            "cg_iterations": 1,
            "every": 4 if changes.get("cg_iterations", 1) == 1 else 1,
            "omega": 0.9,
            "minimum_damping": 1e-6,
            "test_every": 20,
            "power": 0.5,
            "update_every": 20,
            "warmup_updates": 30,
            "warmup": 0.1,
            "data": known_data(problem),
        }
        return cls(**many | changes)

    def build(self, parameters: Iterable[nn.Parameter], seed: int) -> Optimizer:
        """Build the optimizer.

        Args:
            parameters: What it trains.
            seed: Of the cotangents that K-FAC samples.

        Returns:
            The optimizer.
        """
        from hessfree import CG, KFAC, HessianFree, LevenbergMarquardt

        params = list(parameters)
        return HessianFree.stochastic(
            params,
            lr=self.lr,
            damping=self.damping,
            weight_decay=self.weight_decay,
            solver=CG(max_iterations=self.cg_iterations, every=self.every),
            preconditioner=KFAC(
                power=self.power,
                update_every=self.update_every,
                warmup_updates=self.warmup_updates,
                input_moments=moments_of_first_layer(self.data, params),
            ),
            damping_rule=LevenbergMarquardt(every=self.test_every, omega=self.omega, minimum=self.minimum_damping),
            curvature_batch=self.curvature_batch,
            seed=seed,
        )

    def check(self, parameters: int) -> None:
        """Accept every network: memory grows only linearly with it.

        Args:
            parameters: Number of parameters.

        Raises:
            UsageError: If the curvature asks for more rows than there are, or if a step length that is reused is not
                that of one iteration.
        """
        check_curvature_rows(self.curvature_batch, self.batch_size)
        if self.every > 1 and self.cg_iterations != 1:
            raise UsageError(
                f"--set hessfree.every={self.every} reuses the step length of one iteration, and there are "
                f"{self.cg_iterations}; give hessfree.cg_iterations=1, or hessfree.every=1"
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
