"""curves.png: how far each optimizer is, against seconds and against samples."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.problems import Problem
from experiments.records import Run
from experiments.results import score_name

# Fixed, so that an optimizer keeps its colour from figure to figure; distinguishable with any colour vision
# (Okabe and Ito 2008).
COLOURS = {
    "hessfree": "#0072B2",
    "kfac": "#56B4E9",
    "dense-fisher": "#009E73",
    "adam": "#D55E00",
    "soap": "#CC79A7",
    "lbfgs": "#E69F00",
    "sgd": "#777777",
    "adamw": "#F0A36B",
    "muon": "#6A3D9A",
    "shampoo": "#882255",
    "gram": "#999933",
}
OTHERS = ("#555555", "#8C6D31", "#7B4173", "#999999")
_LABELS = {"seconds": "seconds of training", "samples": "training samples"}
INK = "#222222"
_FAINT = "#BBBBBB"
_LETTER = 0.017  # width of a letter of a name, as a share of the axis's


def colour_of(name: str, index: int) -> str:
    """Give the colour of an optimizer.

    Args:
        name: The optimizer.
        index: Its place among those shown, for names that have no colour of their own.

    Returns:
        The colour, as matplotlib takes it.
    """
    return COLOURS.get(name, OTHERS[index % len(OTHERS)])


def write_curves(path: Path, problem: Problem, runs: Sequence[Run]) -> Path:
    """Draw the score of every run against seconds and against samples, both axes logarithmic.

    Args:
        path: The file to write, its ending gives the format.
        problem: What was solved.
        runs: One an optimizer.

    Returns:
        The same path.
    """
    # The object-oriented interface: no global figure, no window system.
    from matplotlib.figure import Figure

    score = score_name(problem.score)
    figure = Figure(figsize=(11, 4.6), dpi=150, layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    figure.suptitle(
        title_of(problem, runs),
        x=0.01,
        ha="left",
        fontsize=13,
        fontweight="bold",
        color=INK,
    )
    _panel(axes[0], problem, runs, "seconds")
    _panel(axes[1], problem, runs, "samples")
    axes[0].set_ylabel(score)
    figure.savefig(path)
    return path


def title_of(problem: Problem, runs: Sequence[Run]) -> str:
    """Say what is drawn.

    Args:
        problem: What was solved.
        runs: One an optimizer, all with one kind of budget.

    Returns:
        The title.
    """
    equal = "seconds of training" if all(run.budget_steps is None for run in runs) else "steps"
    return f"{problem.name}: {score_name(problem.score)} at equal {equal}"


def _panel(axis: Any, problem: Problem, runs: Sequence[Run], against: str) -> None:
    """One panel: lines with their names at their ends, and where all began."""
    ends: list[tuple[float, float, str, str]] = []
    for index, run in enumerate(runs):
        colour = colour_of(run.optimizer, index)
        # A logarithmic axis has no place for the start; the grey line shows its height.
        shown = [(getattr(point, against), point.losses[problem.score]) for point in run.points[1:]]
        shown = [(x, y) for x, y in shown if math.isfinite(y) and y > 0]
        if not shown:
            continue
        xs, ys = zip(*shown, strict=True)
        axis.plot(xs, ys, color=colour, linewidth=2, marker="o", markersize=3.5, label=run.optimizer)
        ends.append((xs[-1], ys[-1], run.optimizer, colour))
    axis.set_xscale("log")
    axis.set_yscale("log")
    start = runs[0].points[0].losses[problem.score]
    axis.axhline(start, color=_FAINT, linewidth=1, linestyle=(0, (4, 3)), zorder=0)
    axis.annotate(
        "initial weights",
        (0.01, start),
        xycoords=("axes fraction", "data"),
        xytext=(0, 3),
        textcoords="offset points",
        fontsize=8,
        color="#777777",
    )
    name_lines(axis, ends)
    style_axis(axis, against)


def name_lines(axis: Any, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Write each name beside the end of its line, with room at the right.

    Where names would lie on each other they are pushed apart, in their order; a thin line leads to a name that moved
    from an end that has no other above or below it.

    Args:
        axis: A matplotlib axis, both scales logarithmic, its lines drawn.
        ends: x and y of the end of a line, its name and its colour.
    """
    if not ends:
        return
    from matplotlib.patheffects import withStroke

    halo = [withStroke(linewidth=3, foreground="white")]  # a name may lie on another's line
    left, right = axis.get_xlim()
    axis.set_xlim(left, right * (right / left) ** 0.22)
    low, high = axis.get_ylim()
    gap = 0.055 * math.log(high / low)
    letter = _LETTER * math.log(axis.get_xlim()[1] / left)
    placed: list[tuple[float, float, float]] = []  # from, to, height: of the names so far, on logarithmic axes
    for x, y, name, colour in sorted(ends, key=lambda end: end[1]):
        start, stop = math.log(x), math.log(x) + (len(name) + 2) * letter
        height = math.log(y)
        for other_start, other_stop, other in sorted(placed, key=lambda one: one[2]):
            if start < other_stop and other_start < stop and abs(height - other) < gap:
                height = other + gap
        placed.append((start, stop, height))
        alone = sum(abs(math.log(x / other)) < letter for other, *_ in ends) == 1
        if alone and height - math.log(y) > 0.3 * gap:
            axis.plot([x, x], [y, math.exp(height)], color=colour, linewidth=0.8, alpha=0.7, clip_on=False)
            axis.set_ylim(low, high)
        # A line that ends in the left half may have others to its right: its name goes above.
        above = math.log(x / left) < 0.5 * math.log(right / left)
        axis.annotate(
            name,
            (x, math.exp(height)),
            xytext=(0, 11) if above else (8, 0),
            textcoords="offset points",
            ha="left" if not above or math.log(x / left) < 0.15 * math.log(right / left) else "center",
            va="center",
            fontsize=10,
            fontweight="bold",
            color=colour,
            path_effects=halo,
        )


def style_axis(axis: Any, against: str) -> None:
    """Give an axis with two logarithmic scales the grid, labels and ticks of all figures.

    Args:
        axis: A matplotlib axis, its lines drawn.
        against: What its x is: "seconds" or "samples".
    """
    axis.set_xlabel(_LABELS[against])
    axis.grid(which="major", color="#E6E6E6", linewidth=0.8)
    axis.grid(which="minor", axis="y", color="#F3F3F3", linewidth=0.6)
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    for side in ("bottom", "left"):
        axis.spines[side].set_color("#999999")
    axis.tick_params(which="both", color="#999999", labelcolor=INK)
    label_ticks(axis.yaxis)
    if against == "seconds":
        axis.xaxis.set_major_formatter("{x:g}")


def label_ticks(scale: Any) -> None:
    """Label a logarithmic scale; where it is short, powers of ten alone would leave one or two labels.

    Args:
        scale: `axis.xaxis` or `axis.yaxis`, what is shown drawn.
    """
    from matplotlib.ticker import LogLocator, NullFormatter

    low, high = sorted(scale.get_view_interval())
    if high / low < 30:
        scale.set_major_locator(LogLocator(subs=range(1, 10) if high / low < 5 else (1, 2, 3, 5)))
        scale.set_major_formatter("{x:g}")
    scale.set_minor_formatter(NullFormatter())
