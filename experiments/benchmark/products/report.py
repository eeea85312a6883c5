"""What the product benchmark says in tables."""

from collections.abc import Sequence
from typing import Any

from experiments.benchmark.products.bars import Bar
from experiments.benchmark.products.implementations import IMPLEMENTATIONS
from experiments.benchmark.products.measuring import SOLVES, Row


def table(rows: Sequence[Row], missing: Sequence[Row], titles: dict[str, str]) -> str:
    """Arrange the measurements: a table a model, a line an implementation, absent ones among them.

    Args:
        rows: What was measured.
        missing: What was not, with its reason.
        titles: Of the models, in their order.

    Returns:
        Markdown.
    """
    totals = " | ".join(f"k {k}" for k in SOLVES)
    sections = []
    for model, title in titles.items():
        lines = [
            f"### {title}",
            "",
            f"| implementation | product, ms (quartiles) | over ours | error | set-up, ms | first, s | {totals} "
            "| peak |",
            "| --- " * (7 + len(SOLVES)) + "|",
        ]
        found = {row["implementation"]: row for row in rows if row["model"] == model}
        reasons = {row["implementation"]: row["reason"] for row in missing if row["model"] == model}
        for name in IMPLEMENTATIONS:
            if name in found:
                lines.append(_line(found[name]))
            elif name in reasons:
                lines.append(f"| {name} | {reasons[name].replace('|', '/')} " + "| " * (5 + len(SOLVES)) + "|")
        sections.append("\n".join(lines))
    note = (
        f"k {', '.join(map(str, SOLVES))}: ms of a set-up at new parameters and k products. first: everything up to "
        "the first product, which traces and compiles. peak: most memory of a set-up and a product, over one "
        "gradient's. error: largest relative error against float64."
    )
    return "\n\n".join([*sections, note])


def _line(row: Row) -> str:
    low, high = row["quartiles_ms"]
    name = f"{row['implementation']} ({row['detail']})" if row["detail"] else row["implementation"]
    cells = [
        name,
        f"{_number(row['median_ms'])} ({_number(low)} - {_number(high)})",
        f"{row['ratio_to_ours']:.2f}",
        "not finite" if row["error"] is None else f"{row['error']:.0e}",
        _number(row["setup_ms"]),
        f"{row['first_ms'] / 1e3:.2f}",
        *(_number(total) for total in row["totals_ms"].values()),
        "-" if row["peak_ratio"] is None else f"{row['peak_ratio']:.2f}",
    ]
    return f"| {' | '.join(cells)} |"


def _number(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def bars_table(bars: Sequence[Bar], titles: dict[str, str]) -> str:
    """Arrange the bars: a line each.

    Args:
        bars: What `judge` returned.
        titles: Of the models.

    Returns:
        A Markdown table.
    """
    lines = ["| bar | model | measured | wanted | |", "| --- | --- | --- | --- | --- |"]
    for bar in sorted(bars, key=lambda bar: bar["bar"]):
        wanted = "" if bar["limit"] is None else f"{'at most' if bar['below'] else 'at least'} {bar['limit']:g}"
        met = {True: "met", False: "**missed**", None: ""}[bar["met"]]
        title = titles.get(bar["model"], bar["model"])
        lines.append(f"| {bar['bar']} | {title} | {bar['value']:.2f} | {wanted} | {met} |")
    return "\n".join(lines)


def step_line(step: dict[str, Any]) -> str:
    """Say what a whole step took, and its parts.

    Args:
        step: What `step.measure` returned.

    Returns:
        One line.
    """
    return (
        f"One step on {step['model']}, {step['k']} products: {step['step_ms']:.3g} ms. Its parts: closure "
        f"{step['closure_ms']:.3g}, set-up {step['setup_ms']:.3g} (the step says {step['setup_reported_ms']:.3g}, "
        f"from_loss takes {step['setup_from_loss_ms']:.3g}), {step['k']} products of {step['product_ms']:.3g}, replay "
        f"{step['replay_ms']:.3g}. Step over parts: {step['ratio']:.2f}"
    )
