"""HessianFree: a `torch.optim.Optimizer` that takes Hessian-free steps. The only file that knows the order of events."""

from __future__ import annotations

import dataclasses
import math
import time
import warnings
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only

from hessfree.curvature import Curvature, CurvatureBuilder
from hessfree.curvature_batch import check_curvature_batch
from hessfree.damping import DampingRule, LevenbergMarquardt
from hessfree.line_search import Found, FullStep, LineSearch, rounding
from hessfree.linearization import check_backend
from hessfree.momentum import Direction, Momentum, QuadraticModelMomentum
from hessfree.preconditioners import KFAC, Preconditioner
from hessfree.recording import (
    BackwardCounter,
    CallTree,
    Closure,
    Owners,
    Recording,
    record,
    replay,
    twice_differentiable,
)
from hessfree.report import StepReport
from hessfree.solvers import CG, Solution, Solver
from hessfree.vectors import ParameterVector

SETTINGS = (
    "model",
    "solver",
    "preconditioner",
    "damping_rule",
    "line_search",
    "momentum",
    "curvature_batch",
    "linearization",
    "seed",
)


class HessianFree(Optimizer):
    """Conjugate gradients on the damped Gauss-Newton matrix, behind the face of `torch.optim.LBFGS`.

    Each step minimises gᵀd + ½ dᵀ(G + λI)d for the present batch, where g is `p.grad` and G = JᵀHJ is known only
    by its products (Martens 2010). `step(closure)` takes the closure of LBFGS, with any differentiable loss code.

    Attributes:
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
        seed: int = 0,
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
            linearization: Back end of the products: "auto", "graph" or "functional".
            seed: For the preconditioner's random cotangents.
        """
        check_backend(linearization)
        check_curvature_batch(curvature_batch)
        if not isinstance(seed, int):
            raise ValueError(f"seed={seed!r} must be an integer")
        self.model = model
        self.solver = _having("solver", solver, "solve")
        self.preconditioner = _having("preconditioner", preconditioner, "inverse")
        self.damping_rule = _having("damping_rule", damping_rule, "next_damping")
        self.line_search = _having("line_search", line_search, "search")
        self.momentum = momentum if momentum is None else _having("momentum", momentum, "combine")
        self.curvature_batch = curvature_batch
        self.linearization = linearization
        self.seed = seed
        self.accumulated_batches: int | None = None
        self.last_step: StepReport | None = None
        super().__init__(params, {"lr": lr, "damping": damping, "weight_decay": weight_decay})
        self._prepare()
        self._trainable()
        self._check_groups()

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
        recipe = {"curvature_batch": 0.125, "damping_rule": LevenbergMarquardt(every=5, minimum=1e-3)}
        return cls(params, **(recipe | changes))

    @classmethod
    def full_batch(cls, params: Any, **changes: Any) -> Self:
        """Return the recipe for fixed data: every step sees the same batch.

        Args:
            params: As for the constructor.
            **changes: Arguments of the constructor that differ from the recipe.

        Returns:
            The optimizer.
        """
        recipe = {
            "momentum": QuadraticModelMomentum(),
            "damping_rule": LevenbergMarquardt(every=1, omega=2 / 3, minimum=1e-9),
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

    def step(self, closure: Closure | None = None) -> Any:  # type: ignore[override]
        """Take one step.

        Args:
            closure: Clears the gradients, computes the loss, calls `loss.backward()` and returns the loss, as
                for `torch.optim.LBFGS`. It may be called again, at trial parameters and with the same random
                numbers; `backward` then does nothing.

        Returns:
            What the closure returned. `last_step` says what happened.

        Raises:
            RuntimeError: No closure was given, or its loss cannot be followed.
            ValueError: The batch is empty, or a setting is out of range.
        """
        if closure is None:
            raise RuntimeError(
                "HessianFree.step() was called without a closure, and needs one: def closure(): optimizer.zero_grad(); "
                "loss = ...; loss.backward(); return loss. (A GradScaler and precision='16-mixed' call step() without "
                "one: use bfloat16 or float32 there)"
            )
        parameters = self._trainable()
        self._check_groups()
        started, seen = time.perf_counter(), self._counter.total
        builder = self._builder
        tree = CallTree(self._owners, parameters.device, builder.keeps_inputs, builder.keeps_value)
        recording = record(closure, parameters, tree)
        backup = parameters.backup()
        damping = [group["damping"] for group in self.param_groups]
        try:
            if self._counter.total == seen:
                raise RuntimeError(
                    "the loss does not depend on any parameter of this optimizer, whose gradients backward() left "
                    "untouched; was the optimizer built from another model, or the output detached?"
                )
            _check_not_empty(recording)
            attempt = _Attempt(self, closure, recording, parameters, backup, time.perf_counter() - started)
            with torch.no_grad(), twice_differentiable():
                outcome = attempt.run()
        except BaseException:
            parameters.restore(backup)
            recording.before.restore()
            for group, value in zip(self.param_groups, damping, strict=True):
                group["damping"] = value
            raise
        self.state["hessfree"] = outcome.state
        self.last_step = outcome.report
        self._counter.reset()
        return recording.returned

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned; tensors move to the parameters' device and keep their dtype.

        Args:
            state_dict: From an optimizer of the same parameters.
        """
        super().load_state_dict(state_dict)
        device = self._trainable().device
        if "hessfree" in self.state:
            self.state["hessfree"] = tree_map_only(Tensor, lambda t: t.to(device), self.state["hessfree"])

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy or a pickle needs."""
        names = (*SETTINGS, "accumulated_batches", "last_step")
        return super().__getstate__() | {name: getattr(self, name) for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore what `__getstate__`, or `load_state_dict`, gives."""
        super().__setstate__(state)
        self._prepare()

    def _prepare(self) -> None:
        """Set up what is derived from the settings and the parameters, and is in no checkpoint."""
        self._replaying = False
        self._warned: set[str] = set()
        self._counter = BackwardCounter()
        self._parameters: ParameterVector | None = None

    def _trainable(self) -> ParameterVector:
        """Return the parameters that require grad now; what was learned of another set of them is dropped."""
        params = [p for group in self.param_groups for p in group["params"] if p.requires_grad]
        if self._parameters is not None and _same(params, self._parameters.params):
            return self._parameters
        if self._parameters is not None and "hessfree" in self.state:
            self.state["hessfree"] |= {"preconditioner": {}, "previous_step": None}
        self._parameters = ParameterVector(params)
        self._owners = Owners(self._parameters)
        self._counter.watch(self._parameters.params)
        taps = self.preconditioner.taps if self.solver.uses_preconditioner else ()
        self._builder = CurvatureBuilder(self.model, self.linearization, self.curvature_batch, taps)
        return self._parameters

    def _check_groups(self) -> None:
        for group in self.param_groups:
            for name in ("lr", "damping", "weight_decay"):
                value = float(group[name])
                if not 0 <= value < math.inf:
                    raise ValueError(f"{name}={group[name]!r} must be finite, and 0 or more")

    def per_parameter(self, name: str) -> list[float]:
        """Return the group setting `name` of each parameter that requires grad."""
        return [float(group[name]) for group in self.param_groups for p in group["params"] if p.requires_grad]

    def warn_once(self, message: str) -> None:
        """Warn the user, once a message."""
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, UserWarning, stacklevel=2)


@dataclasses.dataclass(frozen=True)
class _Outcome:
    state: dict[str, Any]
    report: StepReport


class _Attempt:
    """One step after its closure has run: solve, try, then accept or reject."""

    def __init__(
        self,
        optimizer: HessianFree,
        closure: Closure,
        recording: Recording,
        parameters: ParameterVector,
        backup: list[Tensor],
        seconds_gradient: float,
    ) -> None:
        self.opt = optimizer
        self.closure = closure
        self.recording = recording
        self.parameters = parameters
        self.backup = backup
        old = optimizer.state.get("hessfree", {})
        self.number = old.get("step", 0) + 1
        self.state: dict[str, Any] = {
            "step": self.number,
            "verified": True,
            "replayable": old.get("replayable"),
            "previous_step": old.get("previous_step"),
            "preconditioner": old.get("preconditioner", {}),
        }
        self.was_verified = old.get("verified", True)
        self.loss = float(recording.loss.detach())
        self.facts: dict[str, Any] = {"seconds_gradient": seconds_gradient, "evaluations": 0}
        self.damping = float(optimizer.param_groups[0]["damping"])

    def run(self) -> _Outcome:
        lr = self.parameters.uniform_or_vector(self.opt.per_parameter("lr"))
        decay = self.parameters.uniform_or_vector(self.opt.per_parameter("weight_decay"))
        values = self.parameters.flatten(self.backup)
        rhs = -(self.parameters.gradients() + decay * values)
        norm = float(rhs.norm())
        self.facts["gradient_norm"] = norm
        if not (math.isfinite(self.loss) and math.isfinite(norm)):
            return self._not_finite()
        self._check_replay()
        curvature, learned = self._timed("seconds_setup", self._linearise)
        scale = self._accumulated()
        direction, solution = self._timed("seconds_solve", self._direction, curvature, learned, rhs, scale)
        if solution.failed:
            return self._reject(f"rejected: {solution.status.value}")
        step = lr * direction.value
        terms = self._terms(curvature, scale, direction, step, lr, decay, values)
        if not all(map(math.isfinite, terms)):
            return self._reject("rejected: the step is not finite")
        slope, bend, decay_slope, decay_bend, length = terms
        wanted = self.opt.damping_rule.wants_ratio(self.number)
        found = self._search(step, slope, wanted)
        alpha = found.step_length
        predicted = alpha * (slope + decay_slope) + 0.5 * alpha**2 * (bend + decay_bend)
        change = found.loss - self.loss + alpha * decay_slope + 0.5 * alpha**2 * decay_bend
        ratio = change / predicted if predicted < 0 else math.nan
        self.facts |= {
            "loss_after": found.loss, "predicted_change": predicted, "reduction_ratio": ratio, "step_length": alpha,
        }  # fmt: skip
        if not found.accepted:
            return self._reject(found.why, ratio)
        self.parameters.take_step(self.backup, alpha * step)
        self.state |= {
            "previous_step": alpha * step, "preconditioner": learned, "verified": math.isfinite(found.loss),
        }  # fmt: skip
        self.facts["step_norm"] = alpha * length
        return self._finish(True, found.why, ratio)

    def _linearise(self) -> tuple[Curvature, dict[str, Any]]:
        opt = self.opt
        seed = (opt.seed * 1_000_003 + self.number) % 2**63
        curvature = opt._builder.build(self.recording, self.parameters, opt._owners, seed, opt.warn_once)
        learned = self.state["preconditioner"]
        if curvature.sample is not None and opt.solver.uses_preconditioner:
            if opt.preconditioner.due(learned, self.number):
                learned, warning = opt.preconditioner.update(learned, curvature.sample, self.number)
                if warning is not None:
                    opt.warn_once(warning)
            self.facts["preconditioner"] = opt.preconditioner.describe(learned)
        self.facts |= {
            "backend": curvature.backend, "cut": curvature.cut, "curvature_samples": curvature.samples,
        }  # fmt: skip
        return curvature, learned

    def _direction(
        self, curvature: Curvature, learned: dict[str, Any], rhs: Tensor, scale: float
    ) -> tuple[Direction, Solution]:
        opt, parameters = self.opt, self.parameters
        shifts = [d + w for d, w in zip(opt.per_parameter("damping"), opt.per_parameter("weight_decay"), strict=True)]
        shift = parameters.uniform_or_vector(shifts)
        operator = curvature.operator.scaled(scale)
        precondition = None
        if opt.solver.uses_preconditioner:
            precondition = opt.preconditioner.inverse(learned, parameters, scale, shifts)
        solution = opt.solver.solve(operator, rhs, shift, precondition)
        self.facts |= {
            "iterations": solution.iterations,
            "residual": solution.residuals[-1],
            "residuals": solution.residuals,
            "solver_status": solution.status.value,
        }
        if opt.momentum is None or solution.failed:
            direction = Direction(solution.value, rhs - solution.residual)
        else:
            direction = opt.momentum.combine(operator, rhs, shift, solution, self.state["previous_step"])
        # what the damping added to the product is not curvature
        return direction._replace(product=direction.product - shift * direction.value), solution

    def _terms(
        self,
        curvature: Curvature,
        scale: float,
        direction: Direction,
        step: Tensor,
        lr: float | Tensor,
        decay: float | Tensor,
        values: Tensor,
    ) -> list[float]:
        """Return g_recᵀs, sᵀG_rec s, the same two of the weight decay, and ‖s‖."""
        if isinstance(lr, Tensor):
            product = curvature.operator.matvec(step)
        else:
            product = direction.product * (lr / scale)
        decayed = decay * step
        numbers = (self.recording.gradient @ step, step @ product, values @ decayed, step @ decayed, step.norm())
        return torch.stack(numbers).tolist()

    def _search(self, step: Tensor, slope: float, wanted: bool) -> Found:
        if not self.state["replayable"]:
            return Found(1.0, math.nan, True, "accepted")

        def evaluate(alpha: float) -> float:
            self.parameters.try_step(self.backup, alpha * step)
            try:
                return self._replay()
            finally:
                self.parameters.restore(self.backup)

        return self.opt.line_search.search(evaluate, self.loss, slope, wanted)

    def _accumulated(self) -> float:
        """Return how many times the recorded loss stands for in the gradient: k of k accumulated micro-batches."""
        if self.opt.accumulated_batches is not None:
            return float(self.opt.accumulated_batches)
        if not self.recording.accumulated:
            return 1.0
        return max(1.0, self.opt._counter.highest() / self.recording.backwards)

    def _replay(self) -> float:
        self.facts["evaluations"] += 1
        self.opt._replaying = True
        try:
            return self._timed("seconds_evaluate", replay, self.closure, self.recording, self.parameters)
        finally:
            self.opt._replaying = False

    def _check_replay(self) -> None:
        """See, once, whether the closure computes the same loss again at the same parameters."""
        if self.state["replayable"] is not None:
            return
        again = self._replay()
        bound = max(rounding(self.loss), torch.finfo(self.recording.loss.dtype).eps ** 0.5 * abs(self.loss))
        self.state["replayable"] = abs(again - self.loss) <= bound
        if not self.state["replayable"]:
            self.opt.warn_once(
                f"the closure gave a loss of {self.loss:.6g}, and {again:.6g} when it was called again with the same "
                "parameters and random state; it probably draws data, or from a numpy Generator. Draw the batch before "
                "the closure. Until then the damping stays fixed, and only steps that are not finite are rejected"
            )

    def _not_finite(self) -> _Outcome:
        """Reject; and if the last step, whose loss nobody evaluated, led here, take it back."""
        why = f"rejected: the loss is {self.loss}" if not math.isfinite(self.loss) else "rejected: gradient not finite"
        previous = self.state["previous_step"]
        if not self.was_verified and self.state["replayable"] and previous is not None:
            self.parameters.try_step(self.backup, -previous)
            try:
                finite = math.isfinite(self._replay())
            finally:
                self.parameters.restore(self.backup)
            if finite:
                self.parameters.take_step(self.backup, -previous)
                self.state["previous_step"] = None
                why += "; the step before, which led here, is taken back"
        return self._reject(why)

    def _reject(self, why: str, ratio: float = math.nan) -> _Outcome:
        buffers = self.recording.before.buffers
        if not buffers.finite():
            buffers.restore()
        return self._finish(False, why, ratio)

    def _finish(self, accepted: bool, why: str, ratio: float) -> _Outcome:
        if self.state["replayable"] is not False:
            for group in self.opt.param_groups:
                group["damping"] = self.opt.damping_rule.next_damping(float(group["damping"]), ratio, not accepted)
        report = StepReport(
            step=self.number,
            accepted=accepted,
            status=why,
            loss=self.loss,
            damping=self.damping,
            next_damping=float(self.opt.param_groups[0]["damping"]),
            **self.facts,
        )
        return _Outcome(self.state, report)

    def _timed(self, name: str, function: Callable[..., Any], *args: Any) -> Any:
        started = time.perf_counter()
        try:
            return function(*args)
        finally:
            self.facts[name] = self.facts.get(name, 0.0) + time.perf_counter() - started


def _having(name: str, value: Any, method: str) -> Any:
    if isinstance(value, type) or not callable(getattr(value, method, None)):
        raise TypeError(
            f"{name}={value!r} has no method {method}(); pass an object of hessfree, for example "
            "solver=hessfree.CG(max_iterations=10)"
        )
    return value


def _same(left: list[Tensor], right: tuple[Tensor, ...]) -> bool:
    return len(left) == len(right) and all(a is b for a, b in zip(left, right, strict=True))


def _check_not_empty(recording: Recording) -> None:
    shapes = [tuple(o.shape) for call in recording.roots for o in call.outputs]
    if shapes and all(0 in shape for shape in shapes):
        raise ValueError(f"the batch is empty: the outputs of the network have shapes {shapes}; skip such batches")
