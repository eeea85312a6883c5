"""Which optimizers there are, and what the user changes of their settings."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal, get_args, get_origin, get_type_hints

from experiments.environment import UsageError
from experiments.optimizers.adam import AdamSettings, AdamWSettings
from experiments.optimizers.base import Settings
from experiments.optimizers.dense import DenseFisherSettings
from experiments.optimizers.full_batch import FullBatchSettings
from experiments.optimizers.gram import GramSettings
from experiments.optimizers.hessian_free import HessianFreeSettings
from experiments.optimizers.kfac import KFACSettings
from experiments.optimizers.lbfgs import LBFGSSettings
from experiments.optimizers.muon import MuonSettings
from experiments.optimizers.sgd import SGDSettings
from experiments.optimizers.shampoo import ShampooSettings
from experiments.optimizers.soap import SOAPSettings
from experiments.problems import Problem

OPTIMIZERS: dict[str, type[Settings]] = {
    "hessfree": HessianFreeSettings,
    "dense-fisher": DenseFisherSettings,
    "adam": AdamSettings,
    "soap": SOAPSettings,
    "lbfgs": LBFGSSettings,
    "kfac": KFACSettings,
    "sgd": SGDSettings,
    "adamw": AdamWSettings,
    "muon": MuonSettings,
    "shampoo": ShampooSettings,
    "gram": GramSettings,
}


def settings_class(name: str, problem: Problem) -> type[Settings]:
    """Look up the settings of an optimizer.

    Args:
        name: One of `OPTIMIZERS`.
        problem: What is to be solved.

    Returns:
        The class; HessianFree has a recipe of its own for fixed rows.
    """
    if name == "hessfree" and problem.rows is not None:
        return FullBatchSettings
    return OPTIMIZERS[name]


def default_optimizers(problem: Problem) -> tuple[str, ...]:
    """Name the optimizers that a comparison shows if none are named.

    Args:
        problem: What is to be solved.

    Returns:
        Ours, the textbook's and Adam in two dimensions; above, without the textbook's, whose first step takes minutes.
    """
    return ("hessfree", "dense-fisher", "adam") if problem.dim == 2 else ("hessfree", "adam")


def check_names(names: Sequence[str] | None, assignments: Sequence[str]) -> None:
    """Check what can be checked before the problem is there, which may have to be downloaded.

    Args:
        names: Optimizers; None: those that suit the problem.
        assignments: What the user changes, each as "optimizer.setting=value".

    Raises:
        UsageError: If an optimizer does not exist, is named twice, or is changed and does not run.
    """
    for name in names or ():
        if name not in OPTIMIZERS:
            raise UsageError(f"--optimizers {name!r} is unknown; choose from: {', '.join(OPTIMIZERS)}")
        if list(names or ()).count(name) > 1:
            raise UsageError(f"--optimizers names {name!r} twice; name each optimizer once")
    for assignment in assignments:
        optimizer, _, _ = split_assignment(assignment)
        if names is not None and optimizer not in names:
            raise UsageError(f"--set {assignment!r}: {optimizer} does not run; add it to --optimizers")


def choose_settings(names: Sequence[str], assignments: Sequence[str], problem: Problem) -> dict[str, Settings]:
    """Give the settings of a run.

    Args:
        names: Optimizers, in the order in which they will run.
        assignments: What the user changes, each as "optimizer.setting=value".
        problem: What is to be solved.

    Returns:
        Settings by name.

    Raises:
        UsageError: If an optimizer or setting does not exist, or a value is not possible.
    """
    check_names(names, assignments)
    changes: dict[str, dict[str, Any]] = {name: {} for name in names}
    for assignment in assignments:
        optimizer, setting, value = _parse(assignment, problem)
        changes[optimizer][setting] = value
    return {name: settings_class(name, problem).for_problem(problem, **changed) for name, changed in changes.items()}


def split_assignment(assignment: str) -> tuple[str, str, str]:
    """Split what the user changes into its parts.

    Args:
        assignment: "optimizer.setting=value".

    Returns:
        The optimizer, the setting, which is not looked up, and the value as text.

    Raises:
        UsageError: If it is no assignment, or there is no such optimizer.
    """
    left, equals, text = assignment.partition("=")
    optimizer, dot, setting = left.strip().partition(".")
    if not (equals and dot):
        raise UsageError(f"--set {assignment!r} is no assignment; write it as hessfree.damping=0.1")
    if optimizer not in OPTIMIZERS:
        raise UsageError(f"--set {assignment!r}: no optimizer {optimizer!r}; choose from: {', '.join(OPTIMIZERS)}")
    return optimizer, setting, text.strip()


def _parse(assignment: str, problem: Problem) -> tuple[str, str, int | float | str | None]:
    """Look the setting up, and convert the value to its type."""
    optimizer, setting, text = split_assignment(assignment)
    settings = settings_class(optimizer, problem)
    known = [field.name for field in dataclasses.fields(settings) if field.repr]
    if setting not in known:
        raise UsageError(f"--set {assignment!r}: {optimizer} has no setting {setting!r}; it has: {', '.join(known)}")
    return optimizer, setting, _convert(assignment, text, get_type_hints(settings)[setting])


def _convert(assignment: str, text: str, hint: Any) -> int | float | str | None:
    """Read what a type hint asks for: one of some words, or a number (an int, a float, or one of them or None)."""
    if get_origin(hint) is Literal:
        if text not in get_args(hint):
            raise UsageError(f"--set {assignment!r}: {text!r} is unknown; choose from: {', '.join(get_args(hint))}")
        return text
    kinds = getattr(hint, "__args__", (hint,))
    if type(None) in kinds and text.lower() == "none":
        return None
    kind = int if int in kinds else float
    wanted = "a positive integer" if kind is int else "a finite number, not negative"
    try:
        value = kind(text)
    except ValueError:
        raise UsageError(f"--set {assignment!r}: {text!r} is no {kind.__name__}; give {wanted}") from None
    if not math.isfinite(value) or value < (1 if kind is int else 0):
        raise UsageError(f"--set {assignment!r}: {text!r} is out of range; give {wanted}")
    return value
