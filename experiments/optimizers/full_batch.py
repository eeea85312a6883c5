"""HessianFree where rows are fixed and every step sees them all."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

from torch import nn
from torch.optim import Optimizer

from experiments.environment import UsageError
from experiments.optimizers.base import CommonSettings, check_curvature_rows
from experiments.problems import Problem

_MANY_OUTPUTS = 64  # a row; beyond, rows of random signs say little of them
_HIGH_LOSS = 100.0  # at the start; λ has to begin at its order of magnitude


def _recipe(problem: Problem) -> dict[str, Any]:
    """Give what differs from the recipe of a smooth field of a few components, whose loss starts at ten."""
    if problem.outputs == 1:
        # M can be G + λI itself, and steps are exact
        exact: dict[str, Any] = {"samples": None, "damping_scale": 1.0, "update_every": 3}
        return exact | ({"damping": 100.0} if problem.first_loss > _HIGH_LOSS else {})
    if problem.outputs > _MANY_OUTPUTS and problem.first_loss > _HIGH_LOSS:
        # random signs do not pay for themselves, and a third of the rows is enough for G
        return {
            "damping": 150.0,
            "preconditioner": "kfac",
            "damping_scale": 0.1,
            "omega": 0.5,
            "minimum_damping": 1e-5,
            "curvature_batch": 512,
        }
    return {}


@dataclass(frozen=True, kw_only=True)
class FullBatchSettings(CommonSettings):
    """`HessianFree.full_batch`: the preconditioner stands in for CG, and every step keeps its full length.

    Attributes:
        lr: Length of a step, in units of the Newton step.
        damping: λ of the first step; it should be of the order of the loss.
        batch_size: Rows a step: all there are.
        preconditioner: "woodbury": K-FAC plus the exact curvature of `samples`. "kfac": K-FAC alone.
        samples: Rows that Woodbury takes exactly; None: all of the curvature's.
        weight: Of K-FAC beside those rows.
        update_every: Steps between updates of the preconditioner.
        damping_scale: The preconditioner holds so many times λ.
        omega: Factor by which λ falls or rises a step.
        minimum_damping: The floor under λ.
        curvature_batch: Rows of the curvature; None: all there are.
        weight_decay: Coefficient of the L2 penalty.
    """

    lr_grid: ClassVar[tuple[float, ...]] = ()

    lr: float = 1.0
    damping: float = 0.3
    batch_size: int
    preconditioner: Literal["woodbury", "kfac"] = "woodbury"
    samples: int | None = 256
    weight: float = 0.1
    update_every: int = 10
    damping_scale: float = 0.01
    omega: float = 2 / 3
    minimum_damping: float = 1e-9
    curvature_batch: int | None = None
    weight_decay: float = 0.0
    final_length: float = 1.0

    @classmethod
    def for_problem(cls, problem: Problem, **changes: Any) -> Self:
        """Give the defaults.

        Args:
            problem: What is to be solved.
            **changes: Settings that are to differ.

        Returns:
            All rows a step. A few outputs a row (a velocity field in two dimensions): 256 rows taken exactly, and λ
            from below 1. One output (the Poisson equation): all rows taken exactly, which is cheap then, and λ from
            100 where the loss starts above that. Hundreds of outputs and a loss that starts high (the autoencoder):
            K-FAC alone, because random signs of so many outputs do not pay for themselves; λ from 150, of the order
            of the loss, and halved at each good step, or it stays too high for too long; curvature from a third of
            the rows, which is cheaper and serves as well.

        Raises:
            UsageError: If the problem has no fixed rows.
        """
        if problem.rows is None:
            raise UsageError(f"the full-batch recipe needs fixed rows, and {problem.name} draws new ones for ever")
        recipe = {"batch_size": problem.rows} | _recipe(problem) | changes
        if "curvature_batch" not in changes and (rows := recipe.get("curvature_batch")) is not None:
            recipe["curvature_batch"] = min(rows, recipe["batch_size"])
        return cls(**recipe)

    def build(self, parameters: Iterable[nn.Parameter], seed: int) -> Optimizer:
        """Build the optimizer.

        Args:
            parameters: What it trains.
            seed: Of the cotangents that the preconditioner samples.

        Returns:
            The optimizer.
        """
        from hessfree import KFAC, HessianFree, LevenbergMarquardt, Woodbury

        kfac = KFAC(update_every=self.update_every, damping_scale=self.damping_scale)
        woodbury = Woodbury(
            samples=self.samples,
            weight=self.weight,
            update_every=self.update_every,
            damping_scale=self.damping_scale,
        )
        return HessianFree.full_batch(
            parameters,
            lr=self.lr,
            damping=self.damping,
            weight_decay=self.weight_decay,
            preconditioner=kfac if self.preconditioner == "kfac" else woodbury,
            damping_rule=LevenbergMarquardt(every=1, omega=self.omega, minimum=self.minimum_damping, test="next_loss"),
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
