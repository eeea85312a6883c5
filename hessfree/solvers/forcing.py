"""Forcing terms: how exactly an inexact Newton method solves its linear system, by how the gradient falls.

Far from a minimum an exact step is wasted effort, near it an inexact one spoils Newton's fast convergence.
"""

from __future__ import annotations

import dataclasses
import math
from abc import abstractmethod
from typing import Protocol


class Forcing(Protocol):
    """Chooses the relative residual ‖b − (A + D)x‖/‖b‖ that ends a solve."""

    @abstractmethod
    def tolerance(self, norm: float, last_norm: float | None, last_tolerance: float | None) -> float:
        """Return η, with 0 <= η < 1.

        Args:
            norm: ‖b‖ of this solve.
            last_norm: ‖b‖ of the solve before; None at first.
            last_tolerance: η of the solve before; None at first.

        Returns:
            The tolerance.
        """
        ...


@dataclasses.dataclass(frozen=True)
class EisenstatWalker(Forcing):
    """η = γ (‖b‖/‖last b‖)^α, not to fall faster than γ (last η)^α while that exceeds 0.1.

    Choice 2 with the safeguards of Eisenstat & Walker 1996 (sec. 2.1).

    Attributes:
        gamma: γ.
        alpha: α; 2 gives quadratic convergence where γ < 1.
        first: η of the first solve.
        maximum: η is never greater.
        minimum: η is never smaller: in float32 a residual below 1e-6 is rounding.
    """

    gamma: float = 0.9
    alpha: float = 2.0
    first: float = 0.5
    maximum: float = 0.9
    minimum: float = 1e-6

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            ValueError: A setting is out of range.
        """
        if not 0 < self.gamma <= 1:
            raise ValueError(f"gamma={self.gamma!r} scales the tolerance: choose 0 < gamma <= 1, for example 0.9")
        if not 1 < self.alpha <= 2:
            raise ValueError(f"alpha={self.alpha!r} is the order of convergence: choose 1 < alpha <= 2")
        if not 0 <= self.minimum <= self.first <= self.maximum < 1:
            raise ValueError(
                f"minimum={self.minimum!r}, first={self.first!r} and maximum={self.maximum!r} are relative to the "
                "right-hand side: choose 0 <= minimum <= first <= maximum < 1"
            )

    def tolerance(self, norm: float, last_norm: float | None, last_tolerance: float | None) -> float:
        """Return η (see `Forcing.tolerance`).

        Args:
            norm: ‖b‖ of this solve.
            last_norm: ‖b‖ of the solve before; None at first.
            last_tolerance: η of the solve before; None at first.

        Returns:
            The tolerance.
        """
        if not last_norm or last_tolerance is None:
            return self.first
        chosen = self.gamma * min(norm / last_norm, 1e6) ** self.alpha  # far beyond `maximum`, and no overflow
        floor = self.gamma * last_tolerance**self.alpha
        if floor > 0.1:
            chosen = max(chosen, floor)
        return min(max(chosen, self.minimum), self.maximum)


@dataclasses.dataclass(frozen=True)
class RootGradientNorm(Forcing):
    """η = min(½, √‖b‖) (Nocedal & Wright 2006, algorithm 7.1): superlinear, and in the units of the loss.

    Attributes:
        maximum: In the place of ½.
    """

    maximum: float = 0.5

    def __post_init__(self) -> None:
        """Check the setting.

        Raises:
            ValueError: It is out of range.
        """
        if not 0 < self.maximum < 1:
            raise ValueError(
                f"maximum={self.maximum!r} is relative to the right-hand side: choose 0 < maximum < 1, for example 0.5"
            )

    def tolerance(self, norm: float, last_norm: float | None, last_tolerance: float | None) -> float:
        """Return η (see `Forcing.tolerance`).

        Args:
            norm: ‖b‖ of this solve.
            last_norm: Not used.
            last_tolerance: Not used.

        Returns:
            The tolerance.
        """
        return min(self.maximum, math.sqrt(norm))
