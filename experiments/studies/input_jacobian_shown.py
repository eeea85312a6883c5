"""The table and the picture of the study `input-jacobian`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.plots import name_lines
from experiments.studies import drawing
from experiments.studies.base import Row
from experiments.studies.room import in_words
from experiments.studies.text import error, markdown, memory, milliseconds, number

WIDTH = 64  # of the network's hidden layers
DOUBLE_LOOP, SINGLE_LOOP = "double loop", "single loop"
OURS, FORWARD = "batch_jacobian", "batch_jacobian, forward mode"
_COLOURS = {DOUBLE_LOOP: drawing.SECOND, SINGLE_LOOP: drawing.FIFTH, OURS: drawing.OURS, FORWARD: drawing.THIRD}
_SUB = "₀₁₂₃₄₅"


def table(rows: Sequence[Row]) -> str:
    """Arrange the measurements: a table a kind.

    Args:
        rows: Of any parts.

    Returns:
        Markdown.
    """
    kinds: dict[str, list[Row]] = {}
    for row in rows:
        kinds.setdefault(row["measured"], []).append(row)
    tables = []
    if "Jacobian" in kinds:
        tables.append(_loop_table(kinds["Jacobian"]))
    if "comparison" in kinds:
        lines = [[one["name"], str(one["equal"]), f"{one['difference']:.1e}"] for one in kinds["comparison"]]
        tables.append(markdown(["is it equal?", "prints", "relative difference"], lines))
    if "grad_outputs" in kinds:
        lines = [[one["name"], _matrix(one["grad_outputs"]), _matrix(one["result"])] for one in kinds["grad_outputs"]]
        tables.append(markdown(["grad_outputs", "u", "torch.autograd.grad(z, x, u)"], lines))
    if "device" in kinds:
        lines = [[one["name"], one["form"], milliseconds(one)] for one in kinds["device"]]
        tables.append(markdown(["device", "what", "ms, synchronised (quartiles)"], lines))
    return "\n\n".join(tables)


def _loop_table(rows: Sequence[Row]) -> str:
    lines = []
    for row in rows:
        estimated = row["samples"] != row["B"]
        whole = "-" if row["whole_ms"] is None else number(row["whole_ms"])
        what = f"{row['form']} ({row['samples']} of {row['B']} samples)" if estimated else row["form"]
        over = "-" if row["over_ours"] is None else f"{row['over_ours']:.3g}x"
        size = f"B {row['B']}, D {row['D']}, J {in_words(4 * row['B'] * row['D'] ** 2)}"
        lines.append([size, what, milliseconds(row), whole, over, memory(row), error(row)])
    header = ["Jacobian", "way", "ms (quartiles)", "ms for all samples", "over ours", "peak memory", "error"]
    return markdown(header, lines)


def _matrix(rows: Sequence[Sequence[float]]) -> str:
    return "; ".join(" ".join(f"{one:g}" for one in row) for row in rows)


def draw(path: Path, rows: Sequence[Row]) -> None:
    """Draw time against B; Jv against Jᵀv; and what `grad_outputs` selects.

    Args:
        path: The PNG.
        rows: Of any parts.
    """
    title = "The Jacobian of a velocity network in its input: all rows at once, and Jᵀv is not Jv"
    known = [row for row in rows if row["measured"] == "Jacobian"]
    net = f"ToyMLP({known[0]['D']}, time_varying, 3 hidden layers of {WIDTH}), " if known else ""
    device = known[0]["device"] if known else "cpu"
    figure = drawing.new_figure(title, f"{net}float32, {device}; medians and quartiles", (16.5, 5.2))
    axes = figure.subplots(1, 3, width_ratios=[1.5, 1, 1.05])
    _draw_times(axes[0], known)
    _draw_comparison(axes[1], [row for row in rows if "jv" in row])
    _draw_selection(axes[2], [row for row in rows if row["measured"] == "grad_outputs"])
    figure.savefig(path)


def _draw_times(axis: Any, rows: Sequence[Row]) -> None:
    drawing.plain(axis, "time for the batch Jacobian [B, D', D]")
    ends = []
    for name, colour in _COLOURS.items():
        line = [row for row in rows if row["form"] == name and row["whole_ms"] is not None]
        if not line:
            continue
        xs, ys = [row["B"] for row in line], [row["whole_ms"] for row in line]
        axis.plot(xs, ys, color=colour, linewidth=2, zorder=2)
        for row in line:
            scale = row["whole_ms"] / row["median_ms"]
            axis.plot([row["B"]] * 2, [scale * one for one in row["quartiles_ms"]], color=drawing.INK, linewidth=1)
            face = colour if row["samples"] == row["B"] else "white"
            axis.plot(row["B"], row["whole_ms"], "o", color=colour, markerfacecolor=face, markersize=7, zorder=3)
        over = line[-1]["over_ours"]
        ends.append((xs[-1], ys[-1], name if over is None or name == OURS else f"{name}, {over:.3g}x", colour))
    if rows:
        batches = sorted({row["B"] for row in rows})
        drawing.loglog(axis, "samples B  (hollow: from some of the samples)", "ms")
        axis.set_xticks(batches, [str(one) for one in batches])
        axis.minorticks_off()
        name_lines(axis, ends)


def _draw_comparison(axis: Any, rows: Sequence[Row]) -> None:
    drawing.plain(axis, "why the comparison printed False")
    for row in rows:
        jv, pulled = row["jv"], row["pulled"]
        limit = 1.1 * max(abs(one) for one in [*jv, *pulled])
        axis.plot([-limit, limit], [-limit, limit], color=drawing.OURS, linewidth=2)
        axis.plot(jv, pulled, "o", color=drawing.SECOND, markersize=3.5, alpha=0.6)
        behind = {"facecolor": "white", "edgecolor": "none", "alpha": 0.9, "pad": 1.5}
        style = {"textcoords": "axes fraction", "fontsize": 10, "fontweight": "bold", "bbox": behind}
        axis.annotate("Jv, dense: on the line", (0, 0), xytext=(0.03, 0.93), color=drawing.OURS, **style)
        axis.annotate("Jᵀv, by grad_outputs=v", (0, 0), xytext=(0.03, 0.86), color=drawing.SECOND, **style)
        axis.set_xlim(-limit, limit)
        axis.set_ylim(-limit, limit)
        axis.set_aspect("equal")
    axis.set_xlabel("(Jv)ᵢ  by jvp")
    axis.set_ylabel("what it is compared with")


def _draw_selection(axis: Any, rows: Sequence[Row]) -> None:
    axis.set_title("what grad_outputs selects: rows of J", loc="left", fontsize=11, color=drawing.INK)
    axis.set_xticks([])
    axis.set_yticks([])
    for side in axis.spines.values():
        side.set_visible(False)
    if not rows:
        return
    jacobian = rows[0]["jacobian"]
    for i, row in enumerate(jacobian):
        for j, value in enumerate(row):
            same = i // 3 == j // 3
            face = "#FFFFFF" if not same else "#CFE3F2" if i == 1 else "#F0F0F0"
            axis.add_patch(_rectangle(j, i, face))
            axis.text(
                j + 0.5, i + 0.5, f"{value:g}", ha="center", va="center", color=drawing.INK if same else "#BBBBBB"
            )
    for i in range(6):
        label = f"z{_SUB[i // 3]},{_SUB[i % 3]}"
        axis.text(-0.15, i + 0.5, label, ha="right", va="center", fontweight="bold" if i == 1 else "normal")
        axis.text(i + 0.5, -0.15, f"x{_SUB[i // 3]},{_SUB[i % 3]}", ha="center", va="bottom")
    axis.text(6.2, 1.5, "u one-hot here:\nthis row", va="center", color=drawing.OURS, fontweight="bold")
    axis.text(0, 6.35, "u = 1 everywhere: the sum of all rows,", va="center", color=drawing.INK)
    axis.text(0, 6.75, f"{_matrix(rows[2]['result']) if len(rows) > 2 else ''}", va="center", color=drawing.INK)
    axis.text(0, 7.15, "white blocks: other samples, zero and never needed", va="center", color="#777777")
    axis.set_xlim(-1.0, 9.2)
    axis.set_ylim(7.5, -0.8)


def _rectangle(x: float, y: float, face: str) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((x, y), 1, 1, facecolor=face, edgecolor="#CCCCCC", linewidth=0.8)
