"""How far to go along a direction that the solver found."""

from __future__ import annotations

import dataclasses
import math
from abc import abstractmethod
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch


class Found(NamedTuple):
    """What a line search decided.

    Attributes:
        step_length: α.
        loss: Recorded loss at the step; NaN where it was not evaluated.
        accepted: Whether to take the step.
        why: The reason, for the report.
    """

    step_length: float
    loss: float
    accepted: bool
    why: str


class LineSearch(Protocol):
    """Chooses α in θ + α s."""

    @abstractmethod
    def search(self, evaluate: Callable[[float], float], loss: float, slope: float, wanted: bool) -> Found:
        """Choose α.

        Args:
            evaluate: α -> the recorded loss at θ + α s; each call replays the closure.
            loss: The recorded loss at θ.
            slope: Its derivative along s, gᵀs.
            wanted: Whether the damping rule wants the loss at the chosen α, which must then be evaluated.

        Returns:
            What was found.
        """
        ...


def rounding(loss: float, dtype: torch.dtype = torch.float32) -> float:
    """Return the difference of two losses near `loss` that arithmetic in `dtype` cannot tell from zero."""
    return 10 * torch.finfo(dtype).eps * abs(loss)


@dataclasses.dataclass(frozen=True)
class FullStep(LineSearch):
    """Take α = 1; where the loss is evaluated anyway, reject a step that made it worse."""

    def search(self, evaluate: Callable[[float], float], loss: float, slope: float, wanted: bool) -> Found:
        """Choose α = 1 (see `LineSearch.search`).

        Args:
            evaluate: α -> the recorded loss at θ + α s.
            loss: The recorded loss at θ.
            slope: Not used.
            wanted: Whether to evaluate the loss.

        Returns:
            What was found.
        """
        if not wanted:
            return Found(1.0, math.nan, True, "accepted")
        after = evaluate(1.0)
        if not math.isfinite(after):
            return Found(1.0, after, False, f"rejected: the loss became {after}")
        if after > loss + rounding(loss):
            return Found(1.0, after, False, f"rejected: the loss rose from {loss:.4g} to {after:.4g}")
        return Found(1.0, after, True, "accepted")


@dataclasses.dataclass(frozen=True)
class Armijo(LineSearch):
    """Backtrack from α = 1 until the loss falls by `decrease` times what its slope promises (Armijo 1966).

    Attributes:
        decrease: Share of the promised decrease asked for.
        shrink: Factor on α after each failure.
        max_trials: Give up, and reject the step, after so many evaluations.
    """

    decrease: float = 1e-4
    shrink: float = 0.5
    max_trials: int = 10

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            ValueError: A setting is out of range.
        """
        if not 0 < self.decrease < 1:
            raise ValueError(f"decrease={self.decrease!r} must lie between 0 and 1")
        if not 0 < self.shrink < 1:
            raise ValueError(f"shrink={self.shrink!r} must lie between 0 and 1")
        if not (isinstance(self.max_trials, int) and self.max_trials >= 1):
            raise ValueError(f"max_trials={self.max_trials!r} must be an integer, 1 or more")

    def search(self, evaluate: Callable[[float], float], loss: float, slope: float, wanted: bool) -> Found:
        """Choose α (see `LineSearch.search`).

        Args:
            evaluate: α -> the recorded loss at θ + α s.
            loss: The recorded loss at θ.
            slope: Its derivative along s, gᵀs.
            wanted: Not used: the loss is always evaluated.

        Returns:
            What was found.
        """
        alpha, tried, after = 1.0, 1.0, math.nan
        for _ in range(self.max_trials):
            after = evaluate(alpha)
            bound = loss + self.decrease * alpha * min(slope, 0.0) + rounding(loss)
            if math.isfinite(after) and after <= bound:
                return Found(alpha, after, True, "accepted")
            tried, alpha = alpha, alpha * self.shrink
        why = f"rejected: the loss fell too little at any of {self.max_trials} step lengths down to {tried:.2g}"
        return Found(tried, after, False, why)
