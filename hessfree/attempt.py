"""One step after its closure has run: linearise, solve, try, then accept or reject. The order of events is here."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hessfree.curvature import Curvature, CurvatureBuilder
from hessfree.distributed import ALONE, Ranks, same_bits
from hessfree.groups import GroupValues
from hessfree.line_search import Found, rounding
from hessfree.memory import Memory, Outcome, Pending, reduction_ratio
from hessfree.model_along import ModelAlong
from hessfree.momentum import Direction
from hessfree.operators import Deferred, Sharded
from hessfree.recording import Recording, not_moved, not_repeated
from hessfree.report import StepReport
from hessfree.settings import Settings
from hessfree.solvers import OnShards, Solution
from hessfree.vectors import ParameterVector

_LEAP = 3.0  # times the loss of the step before: more than batches usually differ by


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
        ranks: Ranks = ALONE,
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
            ranks: The processes that take the step together.
        """
        self._ranks = ranks
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
        self._loss = recording.value
        self._lr = parameters.uniform_or_vector(values.lr)
        self._decay = parameters.uniform_or_vector(values.weight_decay)
        self._decays = any(values.weight_decay)
        self._sign = 1.0  # of the recording's gradient, which may have become the right-hand side
        self._shifts = [d + w for d, w in zip(values.damping, values.weight_decay, strict=True)]
        self._shift = parameters.uniform_or_vector(self._shifts)
        self._history = 0 if settings.momentum is None else settings.momentum.history
        self._built: Curvature | None = None
        self._seconds = 0.0
        self._facts: dict[str, Any] = {"evaluations": 0, "damping": values.damping[0]}

    def run(self) -> Outcome:
        """Take the step, or leave the parameters as they are.

        Returns:
            What was decided.
        """
        theta = self._parameters.joined(self._backup)
        gradient = self._parameters.gradients_like(self._recording.gradient)
        norm = self._facts["gradient_norm"] = float(self._decayed(gradient, theta).norm())
        if not (math.isfinite(self._loss) and math.isfinite(norm)):
            return self._not_finite()
        uphill = self._cut_last(theta)
        if uphill is None and 0 < _LEAP * self._memory.loss < self._loss:
            why = f"rejected: the loss leapt from {self._memory.loss:.6g} to {self._loss:.6g}"
            uphill = self._take_back(why, self._loss / _LEAP)
        if uphill is not None:
            return uphill
        self._memory = self._memory.with_gradient(gradient, self._settings.gradient_ema)
        mean = self._memory.gradient_mean
        if mean is None and not self._decays and gradient is self._recording.gradient:
            rhs, self._sign = gradient.neg_(), -1.0  # in place: each vector may be larger than the rest of the step
        else:
            rhs = -self._decayed(gradient if mean is None else mean, theta)
        del gradient, mean
        replayable = self._is_replayable()
        learned = self._timed("seconds_setup", self._learn)
        direction, solution = self._timed("seconds_solve", self._solve, learned, rhs)
        if solution.failed:
            self._ranks.agree()  # it may be an error on one of them
            return self._reject(f"rejected: {solution.status.value}", replayable=replayable)
        whole = not isinstance(self._lr, Tensor) and self._lr == 1
        step = direction.value if whole else self._lr * direction.value
        terms = self._timed("seconds_solve", self._model_along, direction, step, theta, rhs)
        same_bits(self._ranks.agree(None, terms.norm, terms.slope), ("the length of the step", "the slope along it"))
        shorter = terms.shortening(self._settings.max_step_norm, self._settings.step_norm, self._scale)
        if shorter < 1:
            step, terms = shorter * step, terms.scaled(shorter)
        if not terms.finite:
            return self._reject("rejected: the step is not finite", replayable=replayable)
        found = self._search(step, terms.slope) if replayable else Found(1.0, math.nan, True, "accepted")
        alpha = found.step_length
        predicted = terms.predicted(alpha)
        change = found.loss - self._loss + terms.decay_change(alpha)
        ratio = reduction_ratio(change, predicted, self._loss, self._recording.loss.dtype)
        seen = abs(predicted) > rounding(self._loss, self._recording.loss.dtype)
        if found.loss == self._loss and seen and not self._recording.roots:
            replayable = False
            self._warn(not_moved(self._loss))
        self._facts |= {"loss_after": found.loss, "predicted_change": predicted, "reduction_ratio": ratio}
        if not found.accepted:
            return self._reject(found.why, ratio, replayable)
        self._facts |= {"step_norm": alpha * terms.norm, "step_length": alpha}
        taken = step if alpha == 1 else alpha * step
        self._recording.after.restore()  # products may have run modules again, to recompute a checkpoint
        self._parameters.take_step(self._backup, taken)
        pending = None
        if replayable and self._settings.damping_rule.wants_next_loss(self._number):
            pending = (self._penalised(theta), predicted, alpha * (terms.slope + terms.decay_slope), False)
        known = self._memory.steps[: max(self._history - 1, 0)]
        memory = dataclasses.replace(
            self._memory,
            step=self._number,
            replayable=replayable,
            verified=math.isfinite(found.loss),
            loss=self._loss,
            previous_step=taken,
            preconditioner=learned,
            pending=pending,
            solver=solution.memory,
            earlier_steps=known,
        )
        return Outcome(memory, self._report(True, found.why), ratio)

    def _cut_last(self, theta: Tensor) -> Outcome | None:
        """Shorten the step before, where the loss with which this one begins shows that it led uphill.

        It is what a line search would have done, one step later and without an evaluation of its own. The new length
        is the minimum of the parabola through both losses and the slope (Nocedal & Wright 2006, eq. 3.58); a step
        that leads uphill even then is undone. A small rise passes, for steps with momentum need not be monotone.

        Returns:
            The outcome; None where there is nothing to mend.
        """
        previous = self._memory.previous_step
        if self._memory.pending is None or previous is None:
            return None
        pending = Pending(*self._memory.pending)
        rise = self._penalised(theta) - pending.loss
        if not rise > max(-pending.predicted, rounding(pending.loss)):
            return None
        alpha = 0.0 if pending.is_cut else min(max(pending.slope / (2 * (pending.slope - rise)), 0.1), 0.5)
        self._recording.after.restore()
        self._parameters.take_step(self._backup, (alpha - 1) * previous)
        memory = dataclasses.replace(
            self._memory.after_rejection(self._number, self._memory.replayable),
            previous_step=alpha * previous if alpha else None,
            pending=pending.cut(alpha) if alpha else None,
        )
        why = f"rejected: the step before raised the loss from {pending.loss:.6g}, and is "
        why += f"cut to {alpha:.2g} of its length" if alpha else "undone"
        return Outcome(memory, self._report(False, why), math.nan)

    def restore(self) -> None:
        """Put the parameters back, bit for bit."""
        self._parameters.restore(self._backup)

    def _decayed(self, gradient: Tensor, theta: Tensor) -> Tensor:
        """Return the gradient with that of the weight decay."""
        return gradient + self._decay * theta if self._decays else gradient

    def _penalised(self, theta: Tensor) -> float:
        """Return the recorded loss with the weight decay's ½‖θ‖² term."""
        if not self._decays:
            return self._loss
        return self._loss + 0.5 * float(theta @ (self._decay * theta))

    def _curvature(self) -> Curvature:
        """Return the curvature at θ, set up when something first asks for it: many a step does without."""
        if self._built is None:
            self._built = self._timed("seconds_setup", self._linearise)
        return self._built

    def _released(self) -> None:
        """Let the closure's graph be freed where products do without it; nobody learns from it any more."""
        curvature = self._curvature()
        if curvature.sample is not None and curvature.settle():
            self._recording.release()
            self._built = dataclasses.replace(curvature, sample=None, tail=None)

    def _linearise(self) -> Curvature:
        seed = (self._settings.seed * 1_000_003 + self._number) % 2**63
        curvature = self._builder.build(
            self._recording, self._parameters, seed, self._warn, self._scale, self._shifts, self._ranks
        )
        self._facts |= {"backend": curvature.backend, "cut": curvature.cut, "curvature_samples": curvature.samples}
        return curvature

    def _learn(self) -> dict[str, Any]:
        """Return what the preconditioner knows, updated where that is due."""
        settings, learned = self._settings, self._memory.preconditioner
        if not settings.preconditions:
            return learned
        if settings.preconditioner.due(learned, self._number):
            sample = self._curvature().sample
            if sample is not None:
                learned, warning = settings.preconditioner.update(learned, sample(), self._number)
                if warning is not None:
                    self._warn(warning)
        self._facts["preconditioner"] = settings.preconditioner.describe(learned)
        return learned

    def _solve(self, learned: dict[str, Any], rhs: Tensor) -> tuple[Direction, Solution]:
        """Return the direction, and what the solver said."""
        settings, shift, solver = self._settings, self._shift, self._settings.solver
        operator = Deferred(self._parameters, lambda: self._curvature().operator.scaled(self._scale), self._released)
        precondition = None
        if settings.preconditions:
            precondition = settings.preconditioner.inverse(learned, self._parameters, self._scale, self._shifts)
        if settings.shard_vectors and self._ranks.size > 1:
            solver = OnShards(solver, Sharded(operator, self._ranks, lambda: self._curvature().here(self._scale)))
        solution = solver.solve(operator, rhs, shift, precondition, memory=self._memory.solver)
        self._facts |= {"iterations": solution.iterations, "solver_status": solution.status.value}
        if solution.residuals:
            self._facts |= {"residual": solution.residuals[-1], "residuals": solution.residuals}
        residual = solution.residual
        direction = Direction(solution.value, None if residual is None else solution.value @ (rhs - residual))
        if settings.momentum is not None and not solution.failed:
            direction = settings.momentum.combine(operator, rhs, shift, solution, self._memory.steps)
        return direction, solution

    def _model_along(self, direction: Direction, step: Tensor, theta: Tensor, rhs: Tensor) -> ModelAlong:
        numbers = [self._sign * (self._recording.gradient @ step), step.norm(), rhs @ step * self._lr]
        if isinstance(self._lr, Tensor):
            numbers[-1] = rhs @ (self._lr * step)
        decayed = self._decay * step if self._decays else step.new_zeros(())
        numbers[1:1] = [theta @ decayed, step @ decayed] if self._decays else [decayed, decayed]
        bend = self._bend(direction, step)
        numbers += [] if bend is None else [bend.to(step)]
        return ModelAlong(*torch.stack(numbers).tolist())

    def _bend(self, direction: Direction, step: Tensor) -> Tensor | None:
        """Return sᵀ G_rec s; None where it would cost something that nobody asks for."""
        # groups of different lr turn the direction, and its curvature is another
        if direction.bend is not None and not isinstance(self._lr, Tensor):
            damped = (direction.value @ (self._shift * direction.value)).to(direction.bend.device)  # MPS cannot widen
            return (direction.bend - damped.to(direction.bend)) * (self._lr**2 / self._scale)
        settings, rule = self._settings, self._settings.damping_rule
        judged = rule.wants_ratio(self._number) or rule.wants_next_loss(self._number)
        measured = settings.max_step_norm is not None and settings.step_norm == "curvature"
        return self._curvature().operator.quadratic_form(step[None])[0, 0] if judged or measured else None

    def _search(self, step: Tensor, slope: float) -> Found:
        def evaluate(alpha: float) -> float:
            self._parameters.try_step(self._backup, step if alpha == 1 else alpha * step)
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
            self._warn(not_repeated(self._loss, again))
        return same

    def _not_finite(self) -> Outcome:
        """Reject; and if the last step led here, take it back."""
        why = f"rejected: {'the gradient is not finite' if math.isfinite(self._loss) else f'the loss is {self._loss}'}"
        undone = self._take_back(why, math.inf)
        return self._reject(why) if undone is None else undone

    def _take_back(self, why: str, bound: float) -> Outcome | None:
        """Take the last step back, if nobody evaluated its loss and this batch's was at most `bound` before it.

        Returns:
            The outcome; None where that step is not to blame.
        """
        previous = self._memory.previous_step
        if self._memory.verified or not self._memory.replayable or previous is None:
            return None
        self._parameters.try_step(self._backup, -previous)
        try:
            before = self._replay()
        finally:
            self.restore()
        if not (math.isfinite(before) and before <= bound):
            return None
        self._parameters.take_step(self._backup, -previous)
        outcome = self._reject(f"{why}; the step before, which led here, is taken back")
        memory = dataclasses.replace(outcome.memory, previous_step=None, earlier_steps=())
        return dataclasses.replace(outcome, memory=memory)

    def _reject(self, why: str, ratio: float = math.nan, replayable: bool | None = None) -> Outcome:
        self._recording.after.restore()
        buffers = self._recording.before.buffers
        if not buffers.finite():
            buffers.restore()
        if replayable is None:
            replayable = self._memory.replayable
        memory = self._memory.after_rejection(self._number, replayable)
        return Outcome(memory, self._report(False, why), ratio)

    def _report(self, accepted: bool, why: str) -> StepReport:
        return StepReport(step=self._number, accepted=accepted, status=why, loss=self._loss, **self._facts)

    def _timed(self, name: str, function: Callable[..., Any], *args: Any) -> Any:
        """Call `function` and add its seconds to `name`, without those of timed calls inside it."""
        started, counted = time.perf_counter(), self._seconds
        try:
            return function(*args)
        finally:
            own = time.perf_counter() - started - (self._seconds - counted)
            self._seconds += own
            self._facts[name] = self._facts.get(name, 0.0) + own
