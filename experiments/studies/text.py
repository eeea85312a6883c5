"""Cells of the studies' tables."""

from collections.abc import Sequence

from experiments.studies.base import Row
from experiments.studies.room import in_words


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Arrange cells as a Markdown table.

    Args:
        header: Of the columns.
        lines: As many cells each.

    Returns:
        The table.
    """
    rules = ["---"] * len(header)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [list(header), rules, *lines])


def number(value: float | None) -> str:
    """Write three digits, without an exponent from 0.001 on to a million; a dash for None."""
    if value is None:
        return "-"
    return f"{value:.0f}" if 1000 <= value < 1e6 else f"{value:.3g}"


def milliseconds(row: Row) -> str:
    """Write the median with its quartiles, or why there is none."""
    if row["median_ms"] is None:
        return str(row["reason"])
    low, high = row["quartiles_ms"]
    return f"{number(row['median_ms'])} ({number(low)} - {number(high)})"


def memory(row: Row) -> str:
    """Write the peak of a call; what a form that does not fit would need; or a dash."""
    if row["peak_bytes"] is not None:
        return in_words(row["peak_bytes"])
    return f"needs {in_words(row['needed_bytes'])}" if row["needed_bytes"] and row["reason"] else "-"


def error(row: Row) -> str:
    """Write the relative error with one digit; a dash where none was measured."""
    return "-" if row["error"] is None else f"{row['error']:.0e}"
