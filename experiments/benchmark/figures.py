"""What a benchmark shows: curves for each problem, and one figure that sums up."""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.benchmark.measure import Row
from experiments.benchmark.report import Summary, summarize
from experiments.benchmark.suite import CONTENDERS, OURS, REFERENCE
from experiments.plots import COLOURS, OTHERS, label_ticks, name_lines, style_axis
from experiments.results import score_name

_POINTS = 100  # of a median curve
_FLOOR = "#444444"
_NAMES_A_LINE = 6  # of a legend
_AXES = ("seconds", "samples")

Curve = list[tuple[float, float]]  # (seconds or samples, score), ascending and positive


def write_curves(path: Path, rows: Sequence[Row]) -> Path:
    """Draw the score against seconds and against samples: the median over seeds as a line, their range as a band.

    Both axes are logarithmic. Where the statistical floor of a problem was measured, the right panel has it.

    Args:
        path: The file to write; its ending gives the format.
        rows: Runs of one problem.

    Returns:
        The same path.
    """
    from matplotlib.figure import Figure  # without the global state of pyplot

    figure = Figure(figsize=(12, 5), dpi=150, layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    score = score_name(rows[0]["score"])
    seeds = len({row["seed"] for row in rows})
    figure.suptitle(
        f"{rows[0]['problem']}: {score} at equal seconds"
        + (f", median and range of {seeds} seeds" if seeds > 1 else ""),
        x=0.01,
        ha="left",
        fontsize=13,
        fontweight="bold",
    )
    drawn = [_panel(panel, rows, against) for panel, against in zip(panels, _AXES, strict=True)]
    _limit_height(panels[0], rows)
    for panel, ends, against in zip(panels, drawn, _AXES, strict=True):
        if ends:
            name_lines(panel, ends)
            style_axis(panel, against)
    _draw_floor(panels[1], rows)
    panels[0].set_ylabel(score)
    figure.savefig(path)
    return path


def _panel(axis: Any, rows: Sequence[Row], against: str) -> list[tuple[float, float, str, str]]:
    """Draw the lines of one panel; give their ends, with names and colours."""
    axis.set_xscale("log")
    axis.set_yscale("log")
    ends = []
    for index, name in enumerate(dict.fromkeys(row["optimizer"] for row in rows)):
        colour = _colour(name, index)
        curves = [curve for row in rows if row["optimizer"] == name and (curve := _points(row, against))]
        median = median_curve(curves)
        if not median:
            # one step, where steps are long, is a point
            for curve in curves:
                axis.plot(*zip(*curve, strict=True), color=colour, marker="o", markersize=4, linewidth=1)
            ends += [(*curve[-1], name, colour) for curve in curves[:1]]
            continue
        xs = [x for x, _ in median]
        if len(curves) > 1:
            heights = [[_height(curve, x) for curve in curves] for x in xs]
            axis.fill_between(xs, list(map(min, heights)), list(map(max, heights)), color=colour, alpha=0.15, lw=0)
        axis.plot(*zip(*median, strict=True), color=colour, linewidth=2.4 if name == OURS else 1.7)
        ends.append((*median[-1], name, colour))
    return ends


def _limit_height(axis: Any, rows: Sequence[Row]) -> None:
    """Cut off what a run that diverged adds at the top: nothing is learned above three times the start."""
    starts = [row["curve"]["score"][0] for row in rows if row["curve"]["score"]]
    start = max((value for value in starts if value is not None), default=None)
    if start is not None and start > 0 and axis.get_ylim()[1] > 3 * start:
        axis.set_ylim(top=3 * start)


def _draw_floor(axis: Any, rows: Sequence[Row]) -> None:
    """Draw the floor that was measured in the reference's runs: the median over seeds."""
    floors = [row["floor"] for row in rows if row.get("floor")]
    for key, style, words in (
        ("without_prior", (0, (1, 2)), "P·σ²/(D·samples)"),
        ("excess", (0, (5, 2)), "statistical floor"),
    ):
        curve = median_curve([list(zip(floor["samples"], floor[key], strict=True)) for floor in floors])
        if not curve:
            continue
        limits = axis.get_xlim(), axis.get_ylim()
        axis.plot(*zip(*curve, strict=True), color=_FLOOR, linewidth=1.2, linestyle=style, zorder=1)
        axis.set(xlim=limits[0], ylim=(min(limits[1][0], curve[-1][1] / 1.5), limits[1][1]))
        x, y = curve[len(curve) // 2]
        axis.annotate(
            words,
            (x, y),
            xytext=(-4, -4),
            textcoords="offset points",
            ha="right",
            va="top",
            fontsize=9,
            fontstyle="italic",
            color=_FLOOR,
        )


def _colour(name: str, index: int) -> str:
    return COLOURS.get(name, OTHERS[index % len(OTHERS)])


def _points(row: Row, against: str) -> Curve:
    """The part of a curve that logarithmic axes can show."""
    pairs = zip(row["curve"][against][1:], row["curve"]["score"][1:], strict=True)
    return [(x, y) for x, y in pairs if y is not None and y > 0 and x > 0]


def median_curve(curves: Sequence[Sequence[tuple[float, float]]]) -> Curve:
    """Take the median of curves at equal seconds, or equal samples.

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

    places = {name: place for place, name in enumerate(CONTENDERS)}  # one order, whichever ran first
    summaries = sorted(summarize(rows), key=lambda one: places.get(one.optimizer, len(places)))
    problems = list(dict.fromkeys(row["problem"] for row in rows))
    figure = Figure(figsize=(11, 1.8 + 0.45 * len(problems)), dpi=150, layout="constrained")
    final, time = figure.subplots(1, 2, sharey=True)
    _dots(final, summaries, problems, "ratio")
    _dots(time, summaries, problems, "share")
    lost = " (arrow: where that diverged)" if any(one.ratio == 0 for one in summaries) else ""
    final.set_xlabel(f"final score over {OURS}'s{lost} (cross: diverged)")
    time.set_xlabel(f"share of the budget to {REFERENCE}'s final score (cross: never)")
    final.set_yticks(range(len(problems)), problems)
    final.invert_yaxis()
    handles, names = final.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper left", ncols=min(_NAMES_A_LINE, max(1, len(names))), frameon=False)
    figure.savefig(path)
    return path


def _dots(axis: Any, summaries: Sequence[Summary], problems: Sequence[str], panel: str) -> None:
    axis.set_xscale("log")
    axis.axvline(1, color="#BBBBBB", linewidth=1, zorder=0)
    for index, name in enumerate(dict.fromkeys(one.optimizer for one in summaries)):
        places = [(getattr(one, panel), problems.index(one.problem)) for one in summaries if one.optimizer == name]
        shown = [(x, y) for x, y in places if math.isfinite(x) and x > 0]
        xs, ys = zip(*shown, strict=True) if shown else ((), ())
        axis.scatter(xs, ys, color=_colour(name, index), s=45, label=name, zorder=2)
        # What never came must be seen too: inside the right edge, beside each other; and at the left one what came
        # where ours did not.
        for marker, value, edge in (("x", math.inf, 0.985 - 0.025 * index), ("<", 0.0, 0.015 + 0.025 * index)):
            heights = [y for x, y in places if x == value]
            axis.scatter(
                [edge] * len(heights),
                heights,
                color=_colour(name, index),
                s=30,
                marker=marker,
                transform=axis.get_yaxis_transform(),
                clip_on=False,
            )
    if any(math.isinf(getattr(one, panel)) for one in summaries):
        left, right = axis.get_xlim()
        room = max(0.15, 0.035 * len({one.optimizer for one in summaries}))
        axis.set_xlim(left, right * (right / left) ** room)  # for the crosses, beside all dots
    label_ticks(axis.xaxis)
    axis.grid(axis="y", color="#E6E6E6", linewidth=0.8)
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
