"""What tuning tried, shown: so that everyone can see that no rival was left with a bad rate."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.benchmark.tuning import Tuned, written
from experiments.plots import COLOURS, OTHERS, label_ticks

_COLUMNS = 3
_CHOSEN = "#222222"
_ROOM = 20.0  # times the worst score that was chosen: higher ones would flatten all others


def table(tuned: Tuned, problems: Sequence[str]) -> str:
    """Arrange every trial.

    Args:
        tuned: The record of tuning.
        problems: Which of its problems to show.

    Returns:
        A Markdown table: a line a problem and contender, its trials from the best to the worst.
    """
    lines = [
        "| problem | optimizer | seconds a trial | trials, from the best: settings: score |",
        "| --- | --- | --- | --- |",
    ]
    for problem in problems:
        for name, one in _tried(tuned, problem).items():
            ranked = sorted(one["trials"], key=lambda trial: _height(trial["score"]))
            cells = [f"{written(trial['changes'])}: {_score(trial['score'])}" for trial in ranked]
            edge = f" (at the edge: {', '.join(one['at_edge'])})" if one.get("at_edge") else ""
            seconds = f"{one['budget_seconds']:g}{' of the processor' if one.get('clock') == 'cpu' else ''}"
            lines.append(f"| {problem} | {name}{edge} | {seconds} | {'; '.join(cells)} |")
    return "\n".join(lines)


def _tried(tuned: Tuned, problem: str) -> dict[str, Any]:
    """Leave out what was chosen without trials, by hand."""
    return {name: one for name, one in tuned.get(problem, {}).items() if one.get("trials")}


def _height(score: float | None) -> float:
    return math.inf if score is None else score


def _score(score: float | None) -> str:
    return "diverged" if score is None else f"{score:.4g}"


def write_figure(path: Path, tuned: Tuned, problems: Sequence[str]) -> Path:
    """Draw a panel a problem: each trial of each contender as a dot at its final score, the chosen one ringed.

    Args:
        path: The file to write; its ending gives the format.
        tuned: The record of tuning.
        problems: Which of its problems to show; those without trials are left out.

    Returns:
        The same path.
    """
    from matplotlib.figure import Figure

    tried = {problem: _tried(tuned, problem) for problem in problems}
    shown = [problem for problem in problems if tried[problem]]
    columns = min(_COLUMNS, max(1, len(shown)))
    rows = max(1, math.ceil(len(shown) / columns))
    figure = Figure(figsize=(12, 0.8 + 2.7 * rows), dpi=150, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    figure.suptitle(
        f"Tuning: the final score of every trial (ring: chosen; cross: diverged, or over {_ROOM:g} times those)",
        x=0.01,
        ha="left",
        fontsize=13,
        fontweight="bold",
    )
    for panel, problem in zip(panels, shown, strict=False):
        _panel(panel, problem, tried[problem])
    for panel in panels[len(shown) :]:
        panel.set_visible(False)
    figure.savefig(path)
    return path


def _panel(axis: Any, problem: str, contenders: dict[str, Any]) -> None:
    axis.set_yscale("log")
    axis.set_title(problem, loc="left", fontsize=10, fontweight="bold")
    chosen_scores = [t["score"] for one in contenders.values() for t in one["trials"] if t["changes"] == one["chosen"]]
    highest = _ROOM * max(chosen_scores)
    for place, (name, one) in enumerate(contenders.items()):
        colour = COLOURS.get(name, OTHERS[place % len(OTHERS)])
        trials = one["trials"]
        scores = [trial["score"] for trial in trials if trial["score"] is not None and trial["score"] <= highest]
        axis.scatter([place] * len(scores), scores, s=26, color=colour, alpha=0.7, linewidths=0)
        chosen = [trial["score"] for trial in trials if trial["changes"] == one["chosen"]]
        axis.scatter([place] * len(chosen), chosen, s=80, facecolors="none", edgecolors=_CHOSEN, linewidths=1.2)
        if len(scores) < len(trials):  # far above, or nowhere
            axis.scatter([place], [0.97], s=26, color=colour, marker="x", transform=axis.get_xaxis_transform())
    axis.set_xticks(range(len(contenders)), list(contenders), rotation=40, ha="right", fontsize=8)
    axis.margins(x=0.08, y=0.12)
    label_ticks(axis.yaxis)
    axis.tick_params(axis="y", labelsize=8)
    axis.grid(axis="y", color="#E6E6E6", linewidth=0.8)
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
