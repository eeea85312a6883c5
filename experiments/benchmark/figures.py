"""What a benchmark shows: curves for each problem, and one figure that sums up."""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.benchmark.measure import Row
from experiments.benchmark.report import Summary, summarize
from experiments.benchmark.suite import OURS, REFERENCE
from experiments.plots import COLOURS, OTHERS, label_ticks, name_lines, style_axis
from experiments.results import score_name

_POINTS = 100  # of a median curve


def write_curves(path: Path, rows: Sequence[Row]) -> Path:
    """Draw score against seconds on logarithmic axes: each seed thin, the median over seeds thick and named.

    Args:
        path: The file to write; its ending gives the format.
        rows: Runs of one problem.

    Returns:
        The same path.
    """
    from matplotlib.figure import Figure  # without the global state of pyplot

    figure = Figure(figsize=(7.5, 4.8), dpi=150, layout="constrained")
    axis = figure.subplots()
    axis.set_xscale("log")
    axis.set_yscale("log")
    score = score_name(rows[0]["score"])
    axis.set_title(f"{rows[0]['problem']}: {score} against seconds", loc="left", fontsize=12, fontweight="bold")
    ends = []
    for index, name in enumerate(dict.fromkeys(row["optimizer"] for row in rows)):
        colour = _colour(name, index)
        curves = [curve for row in rows if row["optimizer"] == name and (curve := _points(row))]
        for curve in curves:
            # a single step, where steps are long, is a point
            axis.plot(
                *zip(*curve, strict=True), color=colour, linewidth=0.8, alpha=0.4, marker="." if len(curve) == 1 else ""
            )
        median = median_curve(curves)
        if median:
            axis.plot(*zip(*median, strict=True), color=colour, linewidth=2.2)
            ends.append((*median[-1], name, colour))
    if ends:
        name_lines(axis, ends)
        style_axis(axis, "seconds")
    axis.set_ylabel(score)
    figure.savefig(path)
    return path


def _colour(name: str, index: int) -> str:
    return COLOURS.get(name, OTHERS[index % len(OTHERS)])


def _points(row: Row) -> list[tuple[float, float]]:
    """The part of a curve that logarithmic axes can show."""
    pairs = zip(row["curve"]["seconds"][1:], row["curve"]["score"][1:], strict=True)
    return [(x, y) for x, y in pairs if y is not None and y > 0 and x > 0]


def median_curve(curves: Sequence[Sequence[tuple[float, float]]]) -> list[tuple[float, float]]:
    """Take the median of curves at equal seconds.

    Args:
        curves: (seconds, score) pairs, both ascending in seconds and positive.

    Returns:
        The median, interpolated on logarithmic axes, over the seconds that all curves have; empty where there are none.
    """
    if not curves:
        return []
    left, right = max(curve[0][0] for curve in curves), min(curve[-1][0] for curve in curves)
    if not left < right:
        return []
    times = [left * (right / left) ** (index / (_POINTS - 1)) for index in range(_POINTS)]
    return [(time, statistics.median(_height(curve, time) for curve in curves)) for time in times]


def _height(curve: Sequence[tuple[float, float]], time: float) -> float:
    """Interpolate a curve on logarithmic axes."""
    after = next((index for index, (x, _) in enumerate(curve) if x >= time), len(curve) - 1)
    (x0, y0), (x1, y1) = curve[max(after - 1, 0)], curve[after]
    share = min(1.0, math.log(time / x0) / math.log(x1 / x0)) if x1 > x0 else 1.0
    return math.exp(math.log(y0) + share * (math.log(y1) - math.log(y0)))


def write_summary(path: Path, rows: Sequence[Row]) -> Path:
    """Draw two panels, a line a problem: the final scores over ours, and the times to the reference's final score.

    Args:
        path: The file to write; its ending gives the format.
        rows: Runs of any problems.

    Returns:
        The same path.
    """
    from matplotlib.figure import Figure

    summaries = summarize(rows)
    problems = list(dict.fromkeys(one.problem for one in summaries))
    figure = Figure(figsize=(11, 1.8 + 0.45 * len(problems)), dpi=150, layout="constrained")
    final, time = figure.subplots(1, 2, sharey=True)
    _dots(final, summaries, problems, "ratio")
    _dots(time, summaries, problems, "share")
    final.set_xlabel(f"final score over {OURS}'s (cross: diverged)")
    time.set_xlabel(f"share of the budget to {REFERENCE}'s final score (cross: never)")
    final.set_yticks(range(len(problems)), problems)
    final.invert_yaxis()
    handles, names = final.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper left", ncols=max(1, len(names)), frameon=False)
    figure.savefig(path)
    return path


def _dots(axis: Any, summaries: Sequence[Summary], problems: Sequence[str], value: str) -> None:
    axis.set_xscale("log")
    axis.axvline(1, color="#BBBBBB", linewidth=1, zorder=0)
    for index, name in enumerate(dict.fromkeys(one.optimizer for one in summaries)):
        places = [(getattr(one, value), problems.index(one.problem)) for one in summaries if one.optimizer == name]
        shown = [(x, y) for x, y in places if math.isfinite(x) and x > 0]
        xs, ys = zip(*shown, strict=True) if shown else ((), ())
        axis.scatter(xs, ys, color=_colour(name, index), s=45, label=name, zorder=2)
        # What never came must be seen too: inside the right edge, beside each other.
        never = [y for x, y in places if math.isinf(x)]
        edge = [0.985 - 0.025 * index] * len(never)
        axis.scatter(
            edge,
            never,
            color=_colour(name, index),
            s=30,
            marker="x",
            transform=axis.get_yaxis_transform(),
            clip_on=False,
        )
    left, right = axis.get_xlim()
    axis.set_xlim(left, right * (right / left) ** 0.15)  # room for the crosses
    label_ticks(axis.xaxis)
    axis.grid(axis="y", color="#E6E6E6", linewidth=0.8)
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
