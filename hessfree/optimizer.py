"""HessianFree: a `torch.optim.Optimizer` that takes Hessian-free steps."""

from __future__ import annotations

import dataclasses
import math
import time
import warnings
from collections.abc import Sequence
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only

from hessfree.attempt import Attempt
from hessfree.curvature import CurvatureBuilder
from hessfree.damping import DampingRule, LevenbergMarquardt
from hessfree.groups import GroupValues, check_groups, spread
from hessfree.line_search import FullStep, LineSearch
from hessfree.memory import Memory, ratio_of_last
from hessfree.momentum import Momentum, QuadraticModelMomentum
from hessfree.preconditioners import KFAC, Preconditioner, Woodbury
from hessfree.recording import (
    BackwardCounter,
    CallTree,
    Closure,
    Owners,
    Recording,
    Together,
    autocast_as,
    check_closure,
    check_reached,
    replay,
    twice_differentiable,
    unseen,
)
from hessfree.report import StepReport
from hessfree.settings import Precision, Settings, StepNorm
from hessfree.solvers import CG, Solver
from hessfree.vectors import ParameterVector

MEMORY = "hessfree"  # the one string key in `state`: torch casts what stands under a parameter to its dtype


class HessianFree(Optimizer):
    """Conjugate gradients on the damped Gauss-Newton matrix, behind the face of `torch.optim.LBFGS`.

    Each step minimises gᵀd + ½ dᵀ(G + λI)d for the present batch, where g is `p.grad` and G = JᵀHJ is known only
    by its products (Martens 2010). `step(closure)` takes the closure of LBFGS, with any differentiable loss code.

    Attributes:
        settings: The strategies; fixed.
        last_step: What the last step did; None before the first.
        accumulated_batches: Over how many micro-batches `p.grad` is summed, where a trainer knows it; None
            counts the backward passes since `zero_grad`.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1.0,
        damping: float = 0.3,
        weight_decay: float = 0.0,
        *,
        model: nn.Module | None = None,
        solver: Solver = CG(max_iterations=3),
        preconditioner: Preconditioner = KFAC(),
        damping_rule: DampingRule = LevenbergMarquardt(every=5),
        line_search: LineSearch = FullStep(),
        momentum: Momentum | None = None,
        curvature_batch: int | float | None = None,
        linearization: str = "auto",
        microbatch: int | None = None,
        compile: bool = False,
        curvature_precision: Precision = "parameters",
        seed: int = 0,
        max_step_norm: float | None = None,
        step_norm: StepNorm = "euclidean",
        gradient_ema: float = 0.0,
        process_group: Any = "auto",
        shard_vectors: bool = False,
    ) -> None:
        """Set up the optimizer.

        Args:
            params: What `torch.optim.Adam` takes: parameters, named parameters or groups. `lr`, `damping` and
                `weight_decay` may differ by group.
            lr: Length of a step in units of the solver's direction; 1 is the Newton-like step.
            damping: λ at the first step, in units of the loss over squared parameters.
            weight_decay: Coefficient of ½‖θ‖², which enters g, G and the loss that ρ sees.
            model: Look for the network's outputs only at calls of this module; None finds them.
            solver: Solves the damped system.
            preconditioner: Approximates the damped matrix for the solver.
            damping_rule: Changes λ by how well the quadratic model predicted.
            line_search: Chooses how far to go along the direction.
            momentum: Combines the direction with the previous step; None does not.
            curvature_batch: Samples of the batch that G is formed on: a number, a share of the batch (at least
                256), or None for all.
            linearization: Back end of the products: "auto", "traced", "graph" or "functional".
            microbatch: Make products of at most so many samples at a time, for memory: each then evaluates the network
                once more. The closure's own forward, and what a preconditioner looks at, stay whole. None takes all.
            compile: Hand the traced network and its products to torch.compile: seconds to a minute once a signature. On
                CPUs it saves time on forward passes of SELU networks and none on products. Where it fails, one warning
                says why and the trace runs as it is.
            curvature_precision: "parameters" forms G in their own precision, whatever autocast the closure uses;
                "autocast" in that of autocast (see `Settings`).
            seed: For the preconditioner's random cotangents.
            max_step_norm: Shorten steps s longer than this; None does not.
            step_norm: How long is a step: "euclidean" is ‖s‖; for "curvature" and "preconditioner" see `Settings`.
            gradient_ema: β of a moving average of the gradients, which stands for the gradient in the linear system;
                0 does without. It goes on through rejected steps, or a stale mean would be tried for ever.
            process_group: Over whose ranks the loss is averaged; "auto" finds out (see `Settings`).
            shard_vectors: Divide the solver's vectors among the ranks: 5P / ranks numbers each in the place of 5P.
        """
        self.settings = Settings(
            model=model,
            solver=solver,
            preconditioner=preconditioner,
            damping_rule=damping_rule,
            line_search=line_search,
            momentum=momentum,
            curvature_batch=curvature_batch,
            linearization=linearization,
            microbatch=microbatch,
            compile=compile,
            curvature_precision=curvature_precision,
            seed=seed,
            max_step_norm=max_step_norm,
            step_norm=step_norm,
            gradient_ema=gradient_ema,
            process_group=process_group,
            shard_vectors=shard_vectors,
        )
        self.accumulated_batches: int | None = None
        self.last_step: StepReport | None = None
        super().__init__(params, {"lr": lr, "damping": damping, "weight_decay": weight_decay})
        self._prepare()
        self._trainable()
        check_groups(self.param_groups)

    @classmethod
    def stochastic(cls, params: Any, **changes: Any) -> Self:
        """Return the recipe for streaming data: every step sees a new batch.

        Give it batches of a few thousand samples, and let the step length fall to zero with any of torch's
        schedulers (cosine from 1): the last steps then average the noise away.

        Args:
            params: As for the constructor.
            **changes: Arguments of the constructor that differ from the recipe.

        Returns:
            The optimizer.
        """
        rule = LevenbergMarquardt(every=5, omega=0.8, minimum=1e-3)
        recipe: dict[str, Any] = {"curvature_batch": 0.125, "damping_rule": rule}
        return cls(params, **(recipe | changes))

    @classmethod
    def full_batch(cls, params: Any, **changes: Any) -> Self:
        """Return the recipe for fixed data: every step sees the same batch.

        The preconditioner is nearly the damped matrix itself, and stands in for the solver's iterations; each step is
        judged by the loss with which the next one begins, so that no step evaluates the loss twice.

        Args:
            params: As for the constructor.
            **changes: Arguments of the constructor that differ from the recipe.

        Returns:
            The optimizer.
        """
        recipe: dict[str, Any] = {
            "solver": CG(max_iterations=0),
            "preconditioner": Woodbury(),
            "momentum": QuadraticModelMomentum(),
            "damping_rule": LevenbergMarquardt(every=1, omega=2 / 3, minimum=1e-9, test="next_loss"),
        }
        return cls(params, **(recipe | changes))

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, as `torch.optim.Optimizer.zero_grad` does.

        Args:
            set_to_none: Set them to None rather than to zero.
        """
        if self._replaying:  # a replay of the closure must not lose the gradients of its first run
            return
        self._counter.reset()
        super().zero_grad(set_to_none)

    def step(self, closure: Closure | None = None) -> Any:
        """Take one step.

        Args:
            closure: Clears the gradients, computes the loss, calls `loss.backward()` and returns the loss, as
                for `torch.optim.LBFGS`. It may be called again, at trial parameters and with the same random
                numbers; `backward` then does nothing.

        Returns:
            What the closure returned, without its graph. `last_step` says what happened.

        Raises:
            RuntimeError: No closure was given, or its loss cannot be followed.
            ValueError: The batch is empty, or a setting is out of range.
        """
        given, parameters = check_closure(closure), self._trainable()
        check_groups(self.param_groups)
        with self._together.telling():
            return self._step(given, parameters)

    def _step(self, closure: Closure, parameters: ParameterVector) -> Any:
        started, seen = time.perf_counter(), self._counter.total
        tree = CallTree(self._owners, parameters.device, self._builder.keeps_inputs, self._builder.keeps_value)
        recording = self._together.record(closure, parameters, tree, stale=self._counter.highest() == 0)
        try:
            check_reached(recording.roots, self._counter.total - seen)
            self._together.share(recording, parameters, self._accumulated(recording))
            damping = self._damping_after_last(recording, parameters)
            attempt = self._attempt(closure, recording, parameters, damping)
        except BaseException:
            recording.before.restore()
            raise
        seconds = time.perf_counter() - started
        try:
            with torch.no_grad(), twice_differentiable(), autocast_as((), parameters.device), unseen():
                outcome = attempt.run()
        except BaseException:
            attempt.restore()
            recording.before.restore()
            raise
        rule, rejected = self.settings.damping_rule, not outcome.report.accepted
        for group, value in zip(self.param_groups, damping, strict=True):
            known = outcome.memory.replayable is not False
            group["damping"] = rule.next_damping(value, outcome.ratio, rejected) if known else value
        self._memory = outcome.memory
        self.last_step = dataclasses.replace(
            outcome.report, next_damping=float(self.param_groups[0]["damping"]), seconds_gradient=seconds
        )
        self._counter.reset()
        return recording.returned

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned; tensors move to the parameters' device and keep their dtype.

        Args:
            state_dict: From an optimizer of the same parameters.
        """
        super().load_state_dict(state_dict)
        state, device = cast(dict[str, Any], self.state), self._trainable().device
        if MEMORY in state:
            state[MEMORY] = tree_map_only(Tensor, lambda t: t.to(device), state[MEMORY])

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy or a pickle needs."""
        return super().__getstate__() | {n: getattr(self, n) for n in ("settings", "accumulated_batches", "last_step")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore what `__getstate__`, or `load_state_dict`, gives."""
        super().__setstate__(state)
        self._prepare()
        self._trainable()  # micro-batches count from now on

    @property
    def _memory(self) -> Memory:
        return Memory(**cast(dict[str, Any], self.state).get(MEMORY, {}))

    @_memory.setter
    def _memory(self, memory: Memory) -> None:
        fields = dataclasses.fields(memory)
        cast(dict[str, Any], self.state)[MEMORY] = {field.name: getattr(memory, field.name) for field in fields}

    def _prepare(self) -> None:
        """Set up what is derived from the settings and the parameters, and is in no checkpoint."""
        counter: BackwardCounter | None = getattr(self, "_counter", None)
        if counter is not None:
            counter.close()
        self._replaying = False
        self._warned: set[str] = set()
        self._counter = BackwardCounter()
        self._together = Together(self.settings.process_group)
        self._parameters: ParameterVector | None = None

    def _trainable(self) -> ParameterVector:
        """Return the parameters that require grad now; what was learned of another set of them is dropped."""
        params = [p for group in self.param_groups for p in group["params"] if p.requires_grad]
        known = self._parameters
        if known is not None and known.describes(params):
            return known
        if known is not None:
            self._memory = self._memory.for_other_parameters()
        self._parameters = ParameterVector(params)
        self._owners = Owners(self._parameters)
        self._counter.watch(self._parameters.params)
        settings = self.settings
        self._builder = CurvatureBuilder(
            self._owners,
            settings.model,
            settings.backend(self._parameters.divided),
            settings.curvature_batch,
            settings.taps,
            settings.microbatch,
            settings.compile,
            settings.curvature_precision == "autocast",
        )
        return self._parameters

    def _damping_after_last(self, recording: Recording, parameters: ParameterVector) -> list[float]:
        """Return λ of each group, after the step before has been judged by the loss of this one, if it is to be."""
        damping = [float(group["damping"]) for group in self.param_groups]
        decay = spread([group["weight_decay"] for group in self.param_groups], self.param_groups)
        ratio = ratio_of_last(self._memory, recording.value, recording.loss.dtype, parameters, decay)
        if math.isnan(ratio):
            return damping
        return [self.settings.damping_rule.next_damping(value, ratio, False) for value in damping]

    def _attempt(
        self, closure: Closure, recording: Recording, parameters: ParameterVector, damping: Sequence[float]
    ) -> Attempt:
        def evaluate() -> float:
            self._replaying = True
            try:
                return self._together.ranks.mean_number(lambda: replay(closure, recording, parameters))
            finally:
                self._replaying = False

        return Attempt(
            self.settings,
            GroupValues.of(self.param_groups, damping),
            self._memory,
            recording,
            parameters,
            self._builder,
            evaluate,
            self._warn_once,
            self._accumulated(recording),
            self._together.ranks,
        )

    def _accumulated(self, recording: Recording) -> float:
        """Return k where `p.grad` is the sum over k micro-batches, of which the recorded loss is one."""
        known = self.accumulated_batches
        return self._counter.batches(recording.accumulated, recording.backwards) if known is None else float(known)

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, UserWarning, stacklevel=2)
