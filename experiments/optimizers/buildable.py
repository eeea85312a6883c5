"""Values that only the optimizer itself refuses, found before anything is written or trained."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, cast

from experiments.environment import UsageError
from experiments.optimizers.base import Settings
from experiments.optimizers.choose import choose_settings, split_assignment
from experiments.problems import Problem


def check_buildable(contenders: Mapping[str, Settings], assignments: Sequence[str], problem: Problem) -> None:
    """Build every optimizer once, on a network that is thrown away.

    The packages of all optimizers are imported by it, so that in what follows no clock counts that.

    Args:
        contenders: Settings by name of the optimizer.
        assignments: What the user changed of them, each as "optimizer.setting=value".
        problem: What is to be solved.

    Raises:
        UsageError: If an optimizer refuses a value that the user gave.
        ValueError: If one refuses defaults, which no input mends.
        TypeError: The same.
    """
    for name, settings in contenders.items():
        try:
            _build(settings, problem)
        except UsageError:
            raise
        except (ValueError, TypeError) as error:
            own = [assignment for assignment in assignments if split_assignment(assignment)[0] == name]
            if not own:
                raise
            reason = " ".join(str(error).split())
            raise UsageError(_blame(name, own, problem, reason)) from None


def _build(settings: Settings, problem: Problem) -> None:
    lr = settings.lr_grid[0] if settings.lr is None else settings.lr
    dataclasses.replace(cast(Any, settings), lr=lr).build(problem.initial_model(0).parameters(), 0)


def _blame(name: str, own: Sequence[str], problem: Problem, reason: str) -> str:
    """Name the assignment without which the optimizer can be built; where there is none, all of them."""
    for assignment in own:
        try:
            usual = choose_settings([name], [other for other in own if other != assignment], problem)[name]
            _build(usual, problem)
        except (ValueError, TypeError):
            continue
        value = getattr(usual, split_assignment(assignment)[1])
        return f"--set {assignment!r} is refused ({reason}); give another value, or leave it out for {value}"
    return f"--set {' '.join(own)} is refused ({reason}); give other values, or leave them out"
