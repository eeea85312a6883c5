"""products.png: what a product costs over ours, a panel a model."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.benchmark.products.implementations import FLOOR, GRADIENT, IMPLEMENTATIONS, OURS
from experiments.benchmark.products.measuring import Row
from experiments.plots import COLOURS, OTHERS, label_ticks

_COLUMNS = 4
_OURS, _PEER, _UNIT = COLOURS["hessfree"], OTHERS[3], COLOURS["dense-fisher"]


def write(path: Path, rows: Sequence[Row], missing: Sequence[Row], titles: dict[str, str]) -> Path:
    """Draw a bar an implementation on a logarithmic axis that is 1 at ours, with quartiles and numbers.

    Args:
        path: The file to write; its ending gives the format.
        rows: What was measured.
        missing: What was not.
        titles: Of the models, in their order.

    Returns:
        The same path.
    """
    from matplotlib.figure import Figure  # without the global state of pyplot

    names = [name for name in IMPLEMENTATIONS if any(row["implementation"] == name for row in [*rows, *missing])]
    columns = min(_COLUMNS, len(titles))
    lines = math.ceil(len(titles) / columns)
    size = (2.2 + 3.2 * columns, lines * (1.1 + 0.27 * len(names)))
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    figure.suptitle(
        "One product G v, over ours in the same run (log scale, left is faster; -: not measured, the table says why)",
        x=0.01,
        ha="left",
    )
    grid = figure.subplots(lines, columns, sharey=True, squeeze=False)
    ratios = [row["ratio_to_ours"] for row in rows]
    limits = min([0.5, *ratios]) / 1.3, max([2.0, *ratios]) * 4  # room for the numbers
    for axis, (model, title) in zip(grid.flat, titles.items(), strict=False):
        found = {row["implementation"]: row for row in rows if row["model"] == model}
        _panel(axis, title, names, found, limits)
    for axis in grid.flat[len(titles) :]:
        axis.set_visible(False)
    for axis in grid[:, 0]:
        axis.set_yticks(range(len(names)), names)
    grid[0, 0].invert_yaxis()
    figure.savefig(path)
    return path


def _panel(axis: Any, title: str, names: Sequence[str], found: dict[str, Row], limits: tuple[float, float]) -> None:
    axis.set_xscale("log")
    axis.set_xlim(*limits)
    ours = found[OURS]["median_ms"] if OURS in found else math.nan
    axis.set_title(f"{title}\n" + (f"ours: {ours:.3g} ms" if found else "not measured"), loc="left", fontsize=10)
    axis.axvline(1, color="#999999", linewidth=1, zorder=0)
    for place, name in enumerate(names):
        row = found.get(name)
        if row is None:
            axis.annotate("-", (1, place), xytext=(4, 0), textcoords="offset points", va="center", color="#999999")
            continue
        ratio = row["ratio_to_ours"]
        low, high = (one / ours for one in row["quartiles_ms"])
        colour = _OURS if name.startswith(OURS) else _UNIT if name in {FLOOR, GRADIENT} else _PEER
        # bars begin at 1: their length is the factor, to the right or to the left
        axis.barh(place, ratio - 1, left=1, height=0.62, color=colour, alpha=1.0 if name == OURS else 0.75)
        axis.plot([low, high], [place, place], color="#222222", linewidth=1)
        if name == OURS:
            axis.plot([1], [place], marker="D", color=_OURS, markersize=6)
        edge = max(ratio, high, 1.0)
        axis.annotate(f"{ratio:.3g}", (edge, place), xytext=(5, 0), textcoords="offset points", va="center", fontsize=8)
    label_ticks(axis.xaxis)
    axis.grid(axis="x", color="#E6E6E6", linewidth=0.8)
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
