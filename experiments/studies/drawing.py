"""What the studies' pictures share: a title that says what is seen, plain axes, bars with their numbers."""

from collections.abc import Sequence
from typing import Any

from experiments.plots import COLOURS, OTHERS, label_ticks

OURS, SECOND, THIRD = COLOURS["hessfree"], COLOURS["adam"], COLOURS["dense-fisher"]
FOURTH, FIFTH, GREY = COLOURS["soap"], COLOURS["lbfgs"], OTHERS[3]
INK = "#222222"
DPI = 150


def new_figure(title: str, subtitle: str, size: tuple[float, float]) -> Any:
    """Make a figure without pyplot's global state.

    Args:
        title: The finding, in bold.
        subtitle: What was measured, on what.
        size: Inches.

    Returns:
        A matplotlib figure with constrained layout; save it at `DPI`.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=14, fontweight="bold", color=INK)
    figure.supxlabel(subtitle, x=0.01, ha="left", fontsize=9, color="#666666")
    return figure


def plain(axis: Any, title: str = "", grid: str = "both") -> None:
    """Give an axis the studies' look.

    Args:
        axis: A matplotlib axis.
        title: Above it, to the left.
        grid: "both", "x", "y" or "" for none.
    """
    if title:
        axis.set_title(title, loc="left", fontsize=11, color=INK)
    if grid:
        axis.grid(axis=grid, which="major", color="#E6E6E6", linewidth=0.8)
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    for side in ("bottom", "left"):
        axis.spines[side].set_color("#999999")
    axis.tick_params(which="both", color="#999999", labelcolor=INK)


def bars(
    axis: Any,
    names: Sequence[str],
    values: Sequence[float | None],
    colours: Sequence[str],
    notes: Sequence[str],
    spans: Sequence[Sequence[float] | None] = (),
) -> None:
    """Draw horizontal bars, the first on top, a note at the end of each.

    Args:
        axis: A matplotlib axis; a logarithmic scale has to be set before.
        names: At the left.
        values: Lengths; None: no bar, only the note.
        colours: Of the bars.
        notes: At their ends.
        spans: Quartiles, as thin lines over the bars; empty for none.
    """
    known = [value for value in values if value is not None]
    for place, (value, colour, note) in enumerate(zip(values, colours, notes, strict=True)):
        end = 0.0 if value is None else value
        if value is not None:
            axis.barh(place, value, height=0.68, color=colour)
            span = spans[place] if spans else None
            if span is not None:
                axis.plot(span, [place, place], color=INK, linewidth=1.2)
                end = max(end, *span)
        place_at = end if value is not None else axis.get_xlim()[0]
        axis.annotate(
            note,
            (place_at, place),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
            color=INK if value is not None else "#AA3333",
        )
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(len(names) - 0.4, -0.6)
    if known and axis.get_xscale() == "linear":
        ends = known + [max(span) for span in spans if span is not None]
        axis.set_xlim(0, 1.25 * max(ends))


def loglog(axis: Any, x: str, y: str) -> None:
    """Make both scales of an axis logarithmic, with labels that also short scales show; call it when all is drawn.

    Args:
        axis: A matplotlib axis.
        x: Label.
        y: Label.
    """
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    label_ticks(axis.xaxis)
    label_ticks(axis.yaxis)
