"""One step after its closure has run: linearise, solve, try, then accept or reject. The order of events is here."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hessfree.curvature import Curvature, CurvatureBuilder
from hessfree.line_search import Found, rounding
from hessfree.momentum import Direction
from hessfree.recording import Recording
from hessfree.report import StepReport
from hessfree.settings import Settings
from hessfree.solvers import Solution
from hessfree.vectors import ParameterVector


@dataclasses.dataclass(frozen=True)
class GroupValues:
    """The settings of the parameter groups, spread out to one number a parameter.

    Attributes:
        lr: Step length.
        damping: λ.
        weight_decay: Coefficient of ½‖θ‖².
    """

    lr: Sequence[float]
    damping: Sequence[float]
    weight_decay: Sequence[float]


@dataclasses.dataclass(frozen=True)
class Memory:
    """What one step leaves for the next; goes into checkpoints as a plain dict.

    Attributes:
        step: Steps taken, rejected ones included.
        replayable: Whether the closure gives the same loss again; None while unknown.
        verified: Whether the loss after the last accepted step was evaluated.
        previous_step: The last accepted change of the parameters, `[P]`.
        preconditioner: What the preconditioner has learned.
        pending: Where ρ of the last step waits for the next loss: loss (with weight decay) and predicted change.
    """

    step: int = 0
    replayable: bool | None = None
    verified: bool = True
    previous_step: Tensor | None = None
    preconditioner: dict[str, Any] = dataclasses.field(default_factory=dict)
    pending: tuple[float, float] | None = None


def reduction_ratio(change: float, predicted: float, loss: Tensor) -> float:
    """Return actual over predicted change; NaN where the prediction is within the rounding of `loss`."""
    noise = 10 * torch.finfo(loss.dtype).eps * abs(float(loss.detach()))
    return change / predicted if abs(predicted) > noise else math.nan


def ratio_of_last(memory: Memory, loss: Tensor, parameters: ParameterVector, weight_decay: Sequence[float]) -> float:
    """Return ρ of the step before, whose loss after it is the loss with which this one begins.

    Args:
        memory: What the last step left.
        loss: The recorded loss of this step.
        parameters: The parameters.
        weight_decay: One number a parameter.

    Returns:
        ρ, NaN where nobody asked for it.
    """
    if memory.pending is None:
        return math.nan
    before, predicted = memory.pending
    squares = (w * float(p.detach().square().sum()) for w, p in zip(weight_decay, parameters.params, strict=True) if w)
    return reduction_ratio(float(loss.detach()) + 0.5 * sum(squares) - before, predicted, loss)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a step decided.

    Attributes:
        memory: For the next step.
        report: For the user.
        ratio: ρ, NaN where unknown.
    """

    memory: Memory
    report: StepReport
    ratio: float


class Attempt:
    """One step. Nothing outlives a failure: parameters are written last, and everything else is returned."""

    def __init__(
        self,
        settings: Settings,
        values: GroupValues,
        memory: Memory,
        recording: Recording,
        parameters: ParameterVector,
        builder: CurvatureBuilder,
        replay: Callable[[], float],
        warn: Callable[[str], None],
        accumulated: float = 1.0,
    ) -> None:
        """Prepare a step.

        Args:
            settings: The strategies.
            values: The settings of the parameter groups.
            memory: What the last step left.
            recording: The closure's run.
            parameters: The parameters.
            builder: Builds the curvature of the recording.
            replay: Evaluates the recorded loss at the present values of the parameters.
            warn: Tells the user something, once.
            accumulated: Over how many micro-batches `p.grad` is summed: the solver's matrix is so many times the
                recorded loss's G.
        """
        self._settings = settings
        self._memory = memory
        self._recording = recording
        self._parameters = parameters
        self._builder = builder
        self._replay_closure = replay
        self._warn = warn
        self._scale = accumulated
        self._backup = parameters.backup()
        self._number = memory.step + 1
        self._loss = float(recording.loss.detach())
        self._lr = parameters.uniform_or_vector(values.lr)
        self._decay = parameters.uniform_or_vector(values.weight_decay)
        self._shifts = [d + w for d, w in zip(values.damping, values.weight_decay, strict=True)]
        self._shift = parameters.uniform_or_vector(self._shifts)
        self._facts: dict[str, Any] = {"evaluations": 0, "damping": values.damping[0]}

    def run(self) -> Outcome:
        """Take the step, or leave the parameters as they are.

        Returns:
            What was decided.
        """
        theta = self._parameters.flatten(self._backup)
        rhs = -(self._parameters.gradients() + self._decay * theta)
        norm = self._facts["gradient_norm"] = float(rhs.norm())
        if not (math.isfinite(self._loss) and math.isfinite(norm)):
            return self._not_finite()
        replayable = self._is_replayable()
        curvature, learned = self._timed("seconds_setup", self._linearise)
        direction, solution = self._timed("seconds_solve", self._solve, curvature, learned, rhs)
        if solution.failed:
            return self._reject(f"rejected: {solution.status.value}", replayable=replayable)
        step = self._lr * direction.value
        terms = self._model_terms(curvature, direction, step, theta)
        shorter = self._shortening(terms)
        if shorter < 1:
            step, terms = shorter * step, terms.scaled(shorter)
        if not all(math.isfinite(t) for t in dataclasses.astuple(terms)):
            return self._reject("rejected: the step is not finite", replayable=replayable)
        found = self._search(step, terms.slope) if replayable else Found(1.0, math.nan, True, "accepted")
        alpha = found.step_length
        predicted = terms.predicted(alpha)
        ratio = reduction_ratio(found.loss - self._loss + terms.decay_change(alpha), predicted, self._recording.loss)
        if found.loss == self._loss and not math.isnan(ratio) and not self._recording.roots:
            replayable = False
            self._warn(
                f"the loss stayed at {self._loss:.6g} when the parameters changed: the closure computes it from what "
                "was evaluated before. Move the forward pass into the closure. As it is, the damping stays fixed"
            )
        self._facts |= {"loss_after": found.loss, "predicted_change": predicted, "reduction_ratio": ratio}
        if not found.accepted:
            return self._reject(found.why, ratio, replayable)
        self._facts |= {"step_norm": alpha * terms.norm, "step_length": alpha}
        taken = step if alpha == 1 else alpha * step
        self._recording.after.restore()  # products may have run modules again, to recompute a checkpoint
        self._parameters.take_step(self._backup, taken)
        pending = None
        if self._settings.damping_rule.wants_next_loss(self._number):
            pending = (self._loss + 0.5 * float(theta @ (self._decay * theta)), predicted)
        memory = Memory(self._number, replayable, math.isfinite(found.loss), taken, learned, pending)
        return Outcome(memory, self._report(True, found.why), ratio)

    def restore(self) -> None:
        """Put the parameters back, bit for bit."""
        self._parameters.restore(self._backup)

    def _linearise(self) -> tuple[Curvature, dict[str, Any]]:
        settings, learned = self._settings, self._memory.preconditioner
        seed = (settings.seed * 1_000_003 + self._number) % 2**63
        curvature = self._builder.build(
            self._recording, self._parameters, seed, self._warn, self._scale, self._shifts
        )
        if settings.preconditions:
            if curvature.sample is not None and settings.preconditioner.due(learned, self._number):
                learned, warning = settings.preconditioner.update(learned, curvature.sample(), self._number)
                if warning is not None:
                    self._warn(warning)
            self._facts["preconditioner"] = settings.preconditioner.describe(learned)
        self._facts |= {"backend": curvature.backend, "cut": curvature.cut, "curvature_samples": curvature.samples}
        return curvature, learned

    def _solve(self, curvature: Curvature, learned: dict[str, Any], rhs: Tensor) -> tuple[Direction, Solution]:
        """Return the direction with its product G d, damping taken off, and what the solver said."""
        settings, shift = self._settings, self._shift
        operator = curvature.operator.scaled(self._scale)
        precondition = None
        if settings.preconditions:
            precondition = settings.preconditioner.inverse(learned, self._parameters, self._scale, self._shifts)
        solution = settings.solver.solve(operator, rhs, shift, precondition)
        self._facts |= {
            "iterations": solution.iterations,
            "residual": solution.residuals[-1],
            "residuals": solution.residuals,
            "solver_status": solution.status.value,
        }
        direction = Direction(solution.value, rhs - solution.residual)
        if settings.momentum is not None and not solution.failed:
            direction = settings.momentum.combine(operator, rhs, shift, solution, self._memory.previous_step)
        return direction._replace(product=direction.product - shift * direction.value), solution

    def _model_terms(self, curvature: Curvature, direction: Direction, step: Tensor, theta: Tensor) -> _ModelTerms:
        if isinstance(self._lr, Tensor):  # groups of different lr turn the direction, and its product is another
            product = curvature.operator.matvec(step)
        else:
            product = direction.product * (self._lr / self._scale)
        decayed = self._decay * step
        gradient = self._recording.gradient
        numbers = (gradient @ step, step @ product, theta @ decayed, step @ decayed, step.norm())
        return _ModelTerms(*torch.stack(numbers).tolist())

    def _shortening(self, terms: _ModelTerms) -> float:
        """Return the factor that brings the step down to `max_step_norm`."""
        limit = self._settings.max_step_norm
        if limit is None:
            return 1.0
        curved = self._settings.step_norm == "curvature"
        length = math.sqrt(max(terms.bend * self._scale, 0.0)) if curved else terms.norm
        return limit / length if length > limit else 1.0

    def _search(self, step: Tensor, slope: float) -> Found:
        def evaluate(alpha: float) -> float:
            self._parameters.try_step(self._backup, alpha * step)
            try:
                return self._replay()
            finally:
                self.restore()

        wanted = self._settings.damping_rule.wants_ratio(self._number)
        return self._settings.line_search.search(evaluate, self._loss, slope, wanted)

    def _replay(self) -> float:
        self._facts["evaluations"] += 1
        return self._timed("seconds_evaluate", self._replay_closure)

    def _is_replayable(self) -> bool:
        """See, once, whether the closure computes the same loss again at the same parameters."""
        if self._memory.replayable is not None:
            return self._memory.replayable
        again = self._replay()
        bound = max(rounding(self._loss), torch.finfo(self._recording.loss.dtype).eps ** 0.5 * abs(self._loss))
        same = abs(again - self._loss) <= bound
        if not same:
            self._warn(
                f"the closure gave a loss of {self._loss:.6g}, and {again:.6g} when it was called again with the same "
                "parameters and random state: it draws data, or from a numpy Generator, or carries a state from call "
                "to call. Draw the batch before the closure. As it is, the damping stays fixed and only steps that are "
                "not finite are rejected"
            )
        return same

    def _not_finite(self) -> Outcome:
        """Reject; and if the last step, whose loss nobody evaluated, led here, take it back."""
        why = f"rejected: the loss is {self._loss}"
        if math.isfinite(self._loss):
            why = "rejected: the gradient is not finite"
        previous = self._memory.previous_step
        if self._memory.verified or not self._memory.replayable or previous is None:
            return self._reject(why)
        self._parameters.try_step(self._backup, -previous)
        try:
            blameless = math.isfinite(self._replay())
        finally:
            self.restore()
        if not blameless:
            return self._reject(why)
        self._parameters.take_step(self._backup, -previous)
        outcome = self._reject(f"{why}; the step before, which led here, is taken back")
        return dataclasses.replace(outcome, memory=dataclasses.replace(outcome.memory, previous_step=None))

    def _reject(self, why: str, ratio: float = math.nan, replayable: bool | None = None) -> Outcome:
        self._recording.after.restore()
        buffers = self._recording.before.buffers
        if not buffers.finite():
            buffers.restore()
        if replayable is None:
            replayable = self._memory.replayable
        # what was pending has been judged by this step's loss, and is not to be judged twice
        memory = dataclasses.replace(self._memory, step=self._number, replayable=replayable, pending=None)
        return Outcome(memory, self._report(False, why), ratio)

    def _report(self, accepted: bool, why: str) -> StepReport:
        return StepReport(step=self._number, accepted=accepted, status=why, loss=self._loss, **self._facts)

    def _timed(self, name: str, function: Callable[..., Any], *args: Any) -> Any:
        started = time.perf_counter()
        try:
            return function(*args)
        finally:
            self._facts[name] = self._facts.get(name, 0.0) + time.perf_counter() - started


@dataclasses.dataclass(frozen=True)
class _ModelTerms:
    """The quadratic model of the recorded loss along s, and the weight decay's exact quadratic."""

    slope: float  # g_recᵀ s
    bend: float  # sᵀ G_rec s
    decay_slope: float
    decay_bend: float
    norm: float  # ‖s‖

    def scaled(self, factor: float) -> _ModelTerms:
        """Return the model along `factor` times the step."""
        square = factor**2
        decay = factor * self.decay_slope, square * self.decay_bend
        return _ModelTerms(factor * self.slope, square * self.bend, *decay, factor * self.norm)

    def decay_change(self, alpha: float) -> float:
        """Return the exact change of the weight decay's ½‖θ‖² term at θ + α s."""
        return alpha * self.decay_slope + 0.5 * alpha**2 * self.decay_bend

    def predicted(self, alpha: float) -> float:
        """Return the predicted change of loss and weight decay at θ + α s."""
        return alpha * self.slope + 0.5 * alpha**2 * self.bend + self.decay_change(alpha)
