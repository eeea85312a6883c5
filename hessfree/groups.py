"""The numbers of the parameter groups, which may differ by group and change from step to step."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

Groups = Sequence[Mapping[str, Any]]


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

    @classmethod
    def of(cls, groups: Groups, damping: Sequence[float]) -> GroupValues:
        """Read the groups.

        Args:
            groups: `param_groups` of the optimizer.
            damping: λ, one number a group, in the place of the groups' own.

        Returns:
            The values.
        """
        lr, decay = ([group[name] for group in groups] for name in ("lr", "weight_decay"))
        return cls(spread(lr, groups), spread(damping, groups), spread(decay, groups))


def check_groups(groups: Groups) -> None:
    """Refuse numbers with which no step can be taken.

    Args:
        groups: `param_groups` of the optimizer.

    Raises:
        ValueError: A number is negative or not finite.
    """
    for group in groups:
        for name in ("lr", "damping", "weight_decay"):
            if not 0 <= float(group[name]) < math.inf:
                raise ValueError(f"{name}={group[name]!r} must be finite, and 0 or more")


def spread(values: Sequence[float], groups: Groups) -> list[float]:
    """Turn one number a group into one a parameter that requires grad."""
    pairs = zip(values, groups, strict=True)
    return [float(value) for value, group in pairs for p in group["params"] if p.requires_grad]
