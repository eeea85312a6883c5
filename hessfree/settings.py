"""The strategies that make up one HessianFree optimizer, checked once and never changed."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal, get_args

from torch import nn

from hessfree.curvature_batch import check_curvature_batch
from hessfree.damping import DampingRule
from hessfree.distributed import check_process_group
from hessfree.line_search import LineSearch
from hessfree.linearization import check_backend, check_compile, check_microbatch
from hessfree.momentum import Momentum
from hessfree.preconditioners import Preconditioner
from hessfree.solvers import Solver

Precision = Literal["parameters", "autocast"]
StepNorm = Literal["euclidean", "curvature", "preconditioner"]


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything of a HessianFree optimizer that is not a number of a parameter group.

    Attributes:
        model: Look for the network's outputs only at calls of this module; None finds them.
        solver: Solves the damped system.
        preconditioner: Approximates the damped matrix for the solver.
        damping_rule: Changes λ by how well the quadratic model predicted.
        line_search: Chooses how far to go along the direction.
        momentum: Combines the direction with the previous step; None does not.
        curvature_batch: Samples of the batch that G is formed on; None for all.
        linearization: Back end of the products.
        microbatch: Samples that products take at a time; None for all.
        compile: Hand the traced products to torch.compile.
        curvature_precision: "parameters": the products are in the parameters' own precision, whatever autocast the
            closure uses. "autocast": they are in that of autocast, which saves time on hardware that is made for it;
            G is then symmetric to a few percent only, which conjugate gradients feel.
        seed: For the preconditioner's random cotangents.
        max_step_norm: Shorten steps s longer than this; None does not.
        step_norm: "euclidean": ‖s‖. "curvature": √(sᵀGs), in the units of the square root of the loss.
            "preconditioner": lr·√|bᵀd| for s = lr·d, which takes no product. It is √(sᵀMs) where d = M⁻¹b (the
            trust region of Ba, Grosse & Martens 2017), and √(sᵀ(G + λI)s) for an iterate d of CG from zero.
        gradient_ema: β of a moving average of the gradients, in the place of the gradient in b; 0 does without.
        process_group: Over whose ranks the loss is averaged: a process group, whose gradients are then averaged too;
            "auto" for that of the DistributedDataParallel that the closure calls; None for this process alone.
        shard_vectors: Divide the solver's vectors among the ranks (see `hessfree.distributed`); changes nothing else.
    """

    model: nn.Module | None
    solver: Solver
    preconditioner: Preconditioner
    damping_rule: DampingRule
    line_search: LineSearch
    momentum: Momentum | None
    curvature_batch: int | float | None
    linearization: str
    seed: int
    max_step_norm: float | None = None
    step_norm: StepNorm = "euclidean"
    gradient_ema: float = 0.0
    microbatch: int | None = None
    compile: bool = False
    curvature_precision: Precision = "parameters"
    process_group: Any = "auto"
    shard_vectors: bool = False

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            ValueError: A number or a name is out of range.
        """
        check_backend(self.linearization)
        check_microbatch(self.microbatch)
        check_compile(self.compile, self.linearization)
        check_curvature_batch(self.curvature_batch)
        check_process_group(self.process_group)
        if not isinstance(self.seed, int) or isinstance(self.seed, bool):
            raise ValueError(f"seed={self.seed!r} must be an integer")
        if self.shard_vectors and not getattr(self.solver, "works_on_shards", False):
            raise ValueError(
                f"shard_vectors=True needs a solver that works on parts of vectors, and {self.solver!r} does not; "
                "choose CG(...) with warm_start=0 and replace_residual=False"
            )
        if self.max_step_norm is not None and not 0 < self.max_step_norm < math.inf:
            raise ValueError(f"max_step_norm={self.max_step_norm!r} must be positive and finite, or None")
        if self.step_norm not in get_args(StepNorm):
            raise ValueError(f"step_norm={self.step_norm!r} must be 'euclidean', 'curvature' or 'preconditioner'")
        if self.curvature_precision not in get_args(Precision):
            raise ValueError(f"curvature_precision={self.curvature_precision!r} must be 'parameters' or 'autocast'")
        if not 0 <= self.gradient_ema < 1:
            raise ValueError(
                f"gradient_ema={self.gradient_ema!r} is the decay of a mean of gradients: choose 0 <= it < 1, "
                "for example 0.9, or 0 for none"
            )
        if not (self.model is None or isinstance(self.model, nn.Module)):
            raise ValueError(f"model={self.model!r} must be a torch.nn.Module or None")
        _check_has("solver", self.solver, "solve", "hessfree.CG(max_iterations=10)")
        _check_has("preconditioner", self.preconditioner, "inverse", "hessfree.KFAC()")
        _check_has("damping_rule", self.damping_rule, "next_damping", "hessfree.LevenbergMarquardt()")
        _check_has("line_search", self.line_search, "search", "hessfree.FullStep()")
        if self.momentum is not None:
            _check_has("momentum", self.momentum, "combine", "hessfree.QuadraticModelMomentum()")

    @property
    def preconditions(self) -> bool:
        """Whether the solver looks at the preconditioner at all."""
        return self.solver.uses_preconditioner

    def backend(self, divided: bool) -> str:
        """Return the back end for parameters that are `divided` over processes, or not.

        Args:
            divided: Whether some of them are DTensors.

        Returns:
            Its name.

        Raises:
            ValueError: Another one was asked for, or a preconditioner that looks at layers.
        """
        if not divided:
            return self.linearization
        if self.linearization not in {"auto", "graph"}:
            raise ValueError(
                f"linearization={self.linearization!r} cannot be used: some parameters are DTensors (tensor "
                "parallelism), which the autograd graph alone differentiates twice; choose 'graph' or 'auto'"
            )
        if self.taps:
            raise ValueError(
                f"preconditioner={self.preconditioner!r} looks at whole layers, and some parameters are DTensors "
                "(tensor parallelism), of which each process has a part; choose Identity(), Jacobi() or Nystrom()"
            )
        return "graph"

    @property
    def taps(self) -> tuple[type[nn.Module], ...]:
        """Types of modules whose inputs have to be recorded."""
        return self.preconditioner.taps if self.preconditions else ()


def _check_has(name: str, value: Any, method: str, example: str) -> None:
    if isinstance(value, type) or not callable(getattr(value, method, None)):
        raise ValueError(f"{name}={value!r} has no method {method}(); pass an object such as {example}")
