"""K-FAC without conjugate gradients: HessianFree's parts, but no Hessian-free step, and not called one."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

from torch import nn
from torch.optim import Optimizer

from experiments.optimizers.base import CommonSettings
from experiments.optimizers.known_inputs import known_data, moments_of_first_layer
from experiments.problems import Problem


@dataclass(frozen=True, kw_only=True)
class KFACSettings(CommonSettings):
    """The averaged gradient times (K-FAC + damping)^-½, layer by layer: no product with G is ever taken.

    In hundreds of dimensions, where the gradient's noise is spread over many directions, the square root forgives what
    the inverse does not. Where the data are known the first layer's input factor is theirs, not that of batches.

    The rate is so high that early on the bound sets the length of a step; tuned.json has the trials of both.

    Attributes:
        lr: Length of a step, before the bound.
        batch_size: Rows a step.
        damping: What is added to the curvature of each pair of eigenvectors.
        gradient_ema: β of the average of gradients.
        largest_step: Steps s are shortened to sᵀMs = `largest_step`, M being what the gradient is divided by.
        data: Name of the data set; None: the first layer's factor is learned as the others are.
    """

    lr_grid: ClassVar[tuple[float, ...]] = ()

    lr: float = 2.0
    batch_size: int = 512
    damping: float = 1e-5
    gradient_ema: float = 0.9
    largest_step: float = 1e-1
    warmup: float = 0.1
    data: str | None = field(default=None, repr=False)

    @classmethod
    def for_problem(cls, problem: Problem, **changes: Any) -> Self:
        """Give the defaults.

        Args:
            problem: What is to be solved.
            **changes: Settings that are to differ.

        Returns:
            The data are known where a flow is matched to rows drawn anew; fixed rows have moments of their own.
        """
        known: dict[str, Any] = {"data": known_data(problem)}
        if problem.rows is not None:
            known["batch_size"] = min(cls.batch_size, problem.rows)
        return cls(**known | changes)

    def build(self, parameters: Iterable[nn.Parameter], seed: int) -> Optimizer:
        """Build the optimizer, with the moments of the data: their time is its own.

        Args:
            parameters: What it trains; the weight of the layer that takes (x_t, t) is the first.
            seed: Of the cotangents that K-FAC samples.

        Returns:
            The optimizer.
        """
        from hessfree import CG, KFAC, ConstantDamping, HessianFree

        params = list(parameters)
        moments = moments_of_first_layer(self.data, params)
        return HessianFree.stochastic(
            params,
            lr=self.lr,
            damping=self.damping,
            damping_rule=ConstantDamping(),
            solver=CG(max_iterations=0),
            preconditioner=KFAC(
                power=0.5, damping_scale=1.0, update_every=20, warmup_updates=30, input_moments=moments
            ),
            gradient_ema=self.gradient_ema,
            max_step_norm=math.sqrt(self.largest_step),
            step_norm="preconditioner",
            seed=seed,
        )
