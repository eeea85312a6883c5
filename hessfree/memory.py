"""What one step leaves for the next, and the reduction ratio that may have to wait for the next loss."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hessfree.line_search import rounding
from hessfree.report import StepReport
from hessfree.vectors import ParameterVector


class Pending(NamedTuple):
    """A step that the next loss will judge; losses and changes are with weight decay."""

    loss: float  # before the step
    predicted: float  # change by the quadratic model
    slope: float  # change to first order
    is_cut: bool  # whether it is shorter than it was taken at first

    def cut(self, alpha: float) -> tuple[float, float, float, bool]:
        """Return the same for `alpha` times the step, as plain numbers for the memory."""
        predicted = alpha * self.slope + alpha**2 * (self.predicted - self.slope)
        return self.loss, predicted, alpha * self.slope, True


@dataclasses.dataclass(frozen=True)
class Memory:
    """What one step leaves for the next; goes into checkpoints as a plain dict.

    Attributes:
        step: Steps taken, rejected ones included.
        replayable: Whether the closure gives the same loss again; None while unknown.
        verified: Whether the loss after the last accepted step was evaluated.
        loss: With which the last accepted step began; NaN where there was none.
        previous_step: The last accepted change of the parameters, `[P]`.
        preconditioner: What the preconditioner has learned.
        pending: Where ρ of the last step waits for the next loss: the numbers of `Pending`.
        solver: What the solver's last call left for its next; empty after a rejected step.
        earlier_steps: The accepted steps before `previous_step`, as many as the momentum wants, last one first.
        gradient_mean: Moving average of the gradients, `[P]`; None where it is not used.
        gradients: Gradients in `gradient_mean`.
    """

    step: int = 0
    replayable: bool | None = None
    verified: bool = True
    loss: float = math.nan
    previous_step: Tensor | None = None
    preconditioner: dict[str, Any] = dataclasses.field(default_factory=dict)
    pending: tuple[float, float, float, bool] | None = None
    solver: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    earlier_steps: tuple[Tensor, ...] = ()
    gradient_mean: Tensor | None = None
    gradients: int = 0

    @property
    def steps(self) -> tuple[Tensor, ...]:
        """The accepted steps that are known, the last one first."""
        return () if self.previous_step is None else (self.previous_step, *self.earlier_steps)

    def for_other_parameters(self) -> Memory:
        """Return what is still true when the set of parameters has changed."""
        return Memory(self.step, self.replayable, self.verified, pending=self.pending)

    def with_gradient(self, gradient: Tensor, decay: float) -> Memory:
        """Return the memory with `gradient` averaged into the mean.

        The mean is Adam's with its correction for the start at zero: weights proportional to decay^age, which sum
        to one (Kingma & Ba 2015, sec. 3).

        Args:
            gradient: `[P]`, finite.
            decay: β; 0 keeps no mean.

        Returns:
            The memory.
        """
        if decay == 0:
            return dataclasses.replace(self, gradient_mean=None, gradients=0)
        count = self.gradients + 1
        mean = gradient
        if self.gradient_mean is not None:
            mean = torch.lerp(self.gradient_mean, gradient, (1 - decay) / (1 - decay**count))
        return dataclasses.replace(self, gradient_mean=mean, gradients=count)

    def after_rejection(self, step: int, replayable: bool | None) -> Memory:
        """Return what a rejected step leaves: all as before, but the solver starts afresh.

        A step length or a start that led into a rejected step would lead into the next one too. What was pending
        has been judged by this step's loss, and is not to be judged twice.

        Args:
            step: Number of the step.
            replayable: As the attribute.

        Returns:
            The memory.
        """
        return dataclasses.replace(self, step=step, replayable=replayable, pending=None, solver={})


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


def reduction_ratio(change: float, predicted: float, loss: float, dtype: torch.dtype) -> float:
    """Return ρ, actual over predicted change, each taken to be larger by the rounding of the loss where that matters.

    Where a step is too small for its effect to be seen, ρ is near one, unless the loss rose by more than rounding: so λ
    may fall until steps can be judged again (Conn, Gould & Toint 2000, sec. 17.4.2). Were ρ called unknown, a λ once
    grown too large would stay so for ever, for it is what makes the steps small.

    Args:
        change: Of the loss.
        predicted: By the model; negative.
        loss: The recorded loss.
        dtype: Its dtype.

    Returns:
        ρ; NaN where `change` is, or where there is nothing to compare.
    """
    noise = rounding(loss, dtype)
    if abs(predicted) > noise:
        return change / predicted
    return (change - noise) / (min(predicted, 0.0) - noise) if noise > 0 else math.nan


def ratio_of_last(
    memory: Memory, loss: float, dtype: torch.dtype, parameters: ParameterVector, weight_decay: Sequence[float]
) -> float:
    """Return ρ of the step before, whose loss after it is the loss with which this one begins.

    Args:
        memory: What the last step left.
        loss: The recorded loss of this step.
        dtype: Its dtype.
        parameters: The parameters.
        weight_decay: One number a parameter.

    Returns:
        ρ, NaN where nobody asked for it.
    """
    if memory.pending is None:
        return math.nan
    before, predicted, *_ = memory.pending
    pieces = parameters.views(parameters.values()) if any(weight_decay) else ()
    squares = (w * float(t.square().sum()) for w, t in zip(weight_decay, pieces, strict=False))
    return reduction_ratio(loss + 0.5 * sum(squares) - before, predicted, loss, dtype)
