"""What a logger is shown beside numbers: the solver's residuals as a histogram and a figure, and the settings."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from hessfree.optimizer import HessianFree
from hessfree.report import StepReport

BACKENDS = ("none", "graph", "functional", "traced")  # the logged number is the place in this list


def scalars(report: StepReport) -> dict[str, float]:
    """Return the numbers of a step that are known.

    Args:
        report: Of the step.

    Returns:
        Name to number, without the number of the step. `backend` is its place in `BACKENDS`; what the step did not
        need is left out.
    """
    numbers = {name: value for name, value in report.scalars().items() if not math.isnan(value) and name != "step"}
    return numbers | {"backend": float(BACKENDS.index(report.backend))}


def hyperparameters(optimizer: HessianFree) -> dict[str, Any]:
    """Return the settings of an optimizer by name, strategies in words.

    Args:
        optimizer: Any.

    Returns:
        Numbers and strings. Where parameter groups differ, `lr`, `damping` and `weight_decay` are lists in words.
    """
    found: dict[str, Any] = {}
    for name in ("lr", "damping", "weight_decay"):
        values = [float(group[name]) for group in optimizer.param_groups]
        found[name] = values[0] if len(set(values)) == 1 else str(values)
    for field in dataclasses.fields(optimizer.settings):
        value = getattr(optimizer.settings, field.name)
        if isinstance(value, nn.Module):
            value = type(value).__name__
        found[field.name] = value if isinstance(value, int | float | str) else str(value)
    return found


def table(settings: Mapping[str, Any]) -> str:
    """Return settings as a Markdown table."""
    rows = [f"| {name} | `{value}` |" for name, value in settings.items()]
    return "\n".join(["| setting | value |", "| --- | --- |", *rows])


def show_residuals(writer: Any, prefix: str, reports: Sequence[StepReport], step: int) -> None:
    """Show how the solver fared since this was last called.

    Args:
        writer: What a logger calls its experiment. One that knows no `add_histogram` or `add_figure`, as
            TensorBoard's does, is not shown the histogram or the figure.
        prefix: Before the pages' names.
        reports: Of the steps since.
        step: The Trainer's step.
    """
    final = torch.tensor([r.residual for r in reports if r.residual > 0]).log10()  # they go over many decades
    if len(final) and hasattr(writer, "add_histogram"):
        writer.add_histogram(f"{prefix}log10_residual", final, step)
    curves = [r for r in reports if r.residuals]
    if curves and hasattr(writer, "add_figure") and importlib.util.find_spec("matplotlib"):
        writer.add_figure(f"{prefix}residual_curve", residual_figure(curves), step)


def residual_figure(reports: Sequence[StepReport], earlier: int = 20) -> Any:
    """Draw the relative residual against the solver's iterations: the last step's, and those before it in grey.

    Args:
        reports: Of steps with residuals, the last one last.
        earlier: How many of those before to draw.

    Returns:
        A matplotlib figure.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(5, 3.2), dpi=120, layout="constrained")
    axes = figure.subplots()
    for report in reports[-1 - earlier : -1]:
        axes.semilogy(report.residuals, color="0.75", linewidth=0.8)
    last = reports[-1]
    axes.semilogy(last.residuals, color="C0", marker=".", label=f"step {last.step}, λ = {last.damping:.2g}")
    axes.set(xlabel="iteration", ylabel="relative residual", title=last.solver_status)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend()
    return figure
