"""Settings that the preconditioners share: when to learn anew, how to average, how much damping to hold."""

from __future__ import annotations

import dataclasses
import math

from hessfree.preconditioners.base import Preconditioner, State


@dataclasses.dataclass(frozen=True, kw_only=True)
class Refresh(Preconditioner):
    """Learn at every step for the first updates, and then every so many steps.

    The network changes fastest at the beginning, and what was learned of it ages as fast.

    Attributes:
        update_every: Steps between updates.
        warmup_updates: So many updates, the first ones, are made at every step.
    """

    update_every: int = 5
    warmup_updates: int = 3

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            ValueError: A setting is out of range.
        """
        check_count(self, "update_every")
        check_count(self, "warmup_updates", least=0)

    def due(self, state: State, step: int) -> bool:
        """Tell whether to learn at step number `step`.

        Args:
            state: What was learned so far; it holds the number of updates and the step of the last one.
            step: Number of the step.

        Returns:
            Whether an update is wanted.
        """
        return not state or state["updates"] < self.warmup_updates or step - state["step"] >= self.update_every


@dataclasses.dataclass(frozen=True, kw_only=True)
class AveragedRefresh(Refresh):
    """As `Refresh`, and what is learned is averaged over the updates.

    Attributes:
        update_every: Steps between updates.
        warmup_updates: So many updates, the first ones, are made at every step.
        decay: Of the exponential moving average; a plain mean at first.
        damping_scale: M holds so many times the system's damping.
        power: Multiply by M to the power −`power`.
    """

    decay: float = 0.95
    damping_scale: float = 1.0
    power: float = 1.0

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            ValueError: A setting is out of range.
        """
        super().__post_init__()
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay={self.decay!r} must satisfy 0 <= decay < 1")
        check_positive(self, "damping_scale")
        if not 0 < self.power <= 1:
            raise ValueError(f"power={self.power!r} must satisfy 0 < power <= 1")


def check_count(settings: object, name: str, least: int = 1) -> None:
    """Check that a setting is a whole number.

    Args:
        settings: Holds it.
        name: Its name.
        least: The smallest value allowed.

    Raises:
        ValueError: It is no integer, or too small.
    """
    value = getattr(settings, name)
    if not (isinstance(value, int) and not isinstance(value, bool) and value >= least):
        raise ValueError(f"{name}={value!r} must be an integer, {least} or more")


def check_positive(settings: object, name: str) -> None:
    """Check that a setting is a positive number.

    Args:
        settings: Holds it.
        name: Its name.

    Raises:
        ValueError: It is not positive, or not finite.
    """
    value = getattr(settings, name)
    if not 0 < value < math.inf:
        raise ValueError(f"{name}={value!r} must be positive and finite")
