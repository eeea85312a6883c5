"""How the damping λ follows the reduction ratio ρ."""

from __future__ import annotations

import dataclasses
import math
from abc import abstractmethod
from typing import Literal, Protocol


class DampingRule(Protocol):
    """Decides when ρ is wanted, and what it does to λ."""

    @abstractmethod
    def wants_ratio(self, step: int) -> bool:
        """Tell whether the loss after step number `step` (from 1) should be evaluated."""
        ...

    @abstractmethod
    def wants_next_loss(self, step: int) -> bool:
        """Tell whether ρ of step number `step` is to be taken from the loss with which the next step begins."""
        ...

    @abstractmethod
    def next_damping(self, damping: float, ratio: float, rejected: bool) -> float:
        """Return λ for the next step.

        Args:
            damping: λ of this step.
            ratio: ρ; NaN where it was not computed or means nothing.
            rejected: Whether the step was rejected.

        Returns:
            The next λ.
        """
        ...


@dataclasses.dataclass(frozen=True)
class ConstantDamping(DampingRule):
    """λ stays what the parameter group says."""

    def wants_ratio(self, step: int) -> bool:
        """Return False: nothing depends on it."""
        return False

    def wants_next_loss(self, step: int) -> bool:
        """Return False: nothing depends on it."""
        return False

    def next_damping(self, damping: float, ratio: float, rejected: bool) -> float:
        """Return `damping`."""
        return damping


@dataclasses.dataclass(frozen=True)
class LevenbergMarquardt(DampingRule):
    """Shrink λ where the quadratic model predicted well, grow it where it did not (Martens 2010, sec. 4.1).

    Every `every`-th step: ρ > `high` gives λ ← ω^every λ, ρ < `low` or a rejected step λ ← λ / ω^every. In between, a
    step after which the next loss is three times the last is taken back, where that loss was no higher before it.

    Attributes:
        every: Evaluate ρ at every so many steps; one replay of the closure each time.
        omega: Factor a step.
        low: Below this ρ, λ grows.
        high: Above this ρ, λ shrinks.
        minimum: λ never shrinks below it; on noisy data it decides how far the last steps average.
        maximum: λ never grows above it.
        test: "replay" evaluates the loss after the step on the step's own batch. "next_loss" takes the loss with
            which the next step begins, and costs nothing: only where every step sees the same data. A step that
            turns out to have raised the loss is then cut short by the next one, which does nothing else.
    """

    every: int = 5
    omega: float = 0.9
    low: float = 0.25
    high: float = 0.75
    minimum: float = 1e-6
    maximum: float = 1e4
    test: Literal["replay", "next_loss"] = "replay"

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            ValueError: A setting is out of range.
        """
        if not (isinstance(self.every, int) and self.every >= 1):
            raise ValueError(f"every={self.every!r} must be an integer, 1 or more")
        if self.test not in {"replay", "next_loss"}:
            raise ValueError(f"test={self.test!r} must be 'replay' or 'next_loss'")
        if not 0 < self.omega < 1:
            raise ValueError(f"omega={self.omega!r} must lie between 0 and 1")
        if not self.low < self.high:
            raise ValueError(f"low={self.low!r} must be less than high={self.high!r}")
        if not 0 <= self.minimum <= self.maximum < math.inf:
            raise ValueError(
                f"minimum={self.minimum!r} and maximum={self.maximum!r} must satisfy 0 <= minimum <= maximum < inf"
            )

    def wants_ratio(self, step: int) -> bool:
        """Tell whether the loss after step number `step` (from 1) should be evaluated."""
        return self.test == "replay" and (step - 1) % self.every == 0

    def wants_next_loss(self, step: int) -> bool:
        """Tell whether ρ of step number `step` is to be taken from the loss with which the next step begins."""
        return self.test == "next_loss" and (step - 1) % self.every == 0

    def next_damping(self, damping: float, ratio: float, rejected: bool) -> float:
        """Return λ for the next step.

        Args:
            damping: λ of this step.
            ratio: ρ; NaN where it was not computed or means nothing.
            rejected: Whether the step was rejected.

        Returns:
            The next λ. A λ given outside [minimum, maximum] is kept until ρ moves it inside.
        """
        factor = self.omega**self.every
        if rejected or ratio < self.low:
            return max(damping, min(damping / factor, self.maximum), self.minimum)
        if ratio > self.high:
            return min(damping, max(damping * factor, self.minimum))
        return damping
