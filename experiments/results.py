"""What a comparison leaves behind: results.json, and a table to read in the terminal."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.environment import describe
from experiments.problems import Layered, Noisy, Problem
from experiments.records import Point, Run
from experiments.sample_metrics import Quality

_SCORES = {"holdout_loss": "held-out loss"}  # where the name in words is not the key's
_MEANINGS = {
    "excess_loss": "Excess loss is what a network adds to it: mean (v - E[u | x_t, t])² on fixed points.",
    "fixed_excess": "Fixed excess is mean (v - E[u | x_t, t])² on the rows of the training, which have no noise.",
    "train_excess": "Train excess is the training loss on all rows, less what it is for a perfect network.",
    "train_objective": "Train objective is the training loss on all rows.",
}
_REFERENCE = "adam"
PLAIN = "plain"  # the loop of experiments.training
LIGHTNING = "lightning"


def score_name(score: str) -> str:
    """Give the name of a figure in words.

    Args:
        score: A key of a problem's `evaluate`.

    Returns:
        The words.
    """
    return _SCORES.get(score, score.replace("_", " "))


def as_json(
    problem: Problem, runs: Sequence[Run], qualities: Mapping[str, Quality] | None = None, loop: str = PLAIN
) -> dict[str, Any]:
    """Arrange the results as lists of numbers.

    Args:
        problem: What was solved.
        runs: One an optimizer.
        qualities: How good samples are, by optimizer, and of the data themselves.
        loop: What called the optimizers.

    Returns:
        Plain dicts and lists. Seconds and losses are lists of equal length, from the start to the end of a run;
        a number that is not finite is None. What `samples` of a run counts, `Point` says.
    """
    return _finite({
        "data": problem.name,
        "dim": problem.dim,
        "score": problem.score,
        **({"noise_floor": problem.noise_floor} if isinstance(problem, Noisy) else {}),
        **({"width": problem.width, "hidden_layers": problem.n_hidden} if isinstance(problem, Layered) else {}),
        "loop": loop,
        "environment": describe(problem.device),
        "samples": {name: dataclasses.asdict(quality) for name, quality in (qualities or {}).items()},
        "runs": [_run_as_json(run) for run in runs],
    })


def _run_as_json(run: Run) -> dict[str, Any]:
    rows = [_row(point) for point in run.points]
    return {
        "optimizer": run.optimizer,
        "settings": _settings(run),
        "seed": run.seed,
        "budget_seconds": run.budget_seconds,
        "budget_steps": run.budget_steps,
        "sweep": [dataclasses.asdict(trial) for trial in run.sweep],
        **{name: [row[name] for row in rows] for name in rows[0]},
        "internals": [point.internals for point in run.points],
        "final": rows[-1] | {"overshoot_seconds": run.overshoot_seconds},
    }


def _row(point: Point) -> dict[str, float]:
    own = {name: getattr(point, name) for name in ("seconds", "samples", "step", "train_loss")}
    return own | point.losses


def _settings(run: Run) -> dict[str, Any]:
    # Settings are dataclasses of numbers; `asdict` asks for a concrete type where the protocol is enough.
    settings: Any = run.settings
    return dataclasses.asdict(settings)


def _finite(value: Any) -> Any:
    """Replace NaN and infinities, which JSON does not have, by None, all the way down."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(
    path: Path,
    problem: Problem,
    runs: Sequence[Run],
    qualities: Mapping[str, Quality] | None = None,
    loop: str = PLAIN,
) -> Path:
    """Write results.json.

    Args:
        path: The file.
        problem: What was solved.
        runs: One an optimizer.
        qualities: How good samples are, by optimizer, and of the data themselves.
        loop: What called the optimizers.

    Returns:
        The same path.
    """
    path.write_text(json.dumps(as_json(problem, runs, qualities, loop), indent=1, allow_nan=False) + "\n")
    return path


def table(problem: Problem, runs: Sequence[Run], loop: str = PLAIN) -> str:
    """Arrange the ends of the runs as text.

    Args:
        problem: What was solved.
        runs: One an optimizer.
        loop: What called the optimizers.

    Returns:
        Aligned columns, a line an optimizer, and notes below.
    """
    reference = next((run.final.losses[problem.score] for run in runs if run.optimizer == _REFERENCE), math.nan)
    header = ["optimizer", "lr", "steps", "samples", "seconds", "train loss"]
    header += [score_name(problem.score), f"/ {_REFERENCE}"]
    rows = [header]
    for run in runs:
        final = run.final
        value = final.losses[problem.score]
        rows.append([
            run.optimizer,
            f"{run.settings.lr:g}",
            f"{final.step}",
            f"{final.samples}",
            f"{final.seconds:.1f}",
            f"{final.train_loss:.4g}",
            f"{value:.4g}",
            f"{value / reference:.3f}" if math.isfinite(value / reference) else "-",
        ])
    return "\n".join([*_aligned(rows), "", *_notes(problem, runs, loop)])


def quality_table(qualities: Mapping[str, Quality], how: str) -> str:
    """Arrange the distances of samples from data as text.

    Args:
        qualities: By what was sampled: the optimizers, and the data themselves.
        how: In words, how the samples were made.

    Returns:
        Aligned columns, a line each, and notes below.
    """
    rows = [["samples of", "energy distance", "sliced Wasserstein"]]
    rows += [[name, f"{one.energy_distance:.4f}", f"{one.sliced_wasserstein:.4f}"] for name, one in qualities.items()]
    notes = [f"Distances to held-out data; samples: {how}."]
    for name, one in qualities.items():
        if not (math.isfinite(one.energy_distance) and math.isfinite(one.sliced_wasserstein)):
            notes.append(
                f"{name} has no distance: samples are not finite, for the field diverges along a path, or is too steep "
                f"for the sampler (dopri5 gives up all paths for one; fixed steps, as of --sampler midpoint, do not)."
            )
    return "\n".join([*_aligned(rows), "", *notes])


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """First column to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        cells[0] = row[0].ljust(widths[0])
        lines.append("  ".join(cells))
    lines.insert(1, "  ".join("-" * width for width in widths))
    return lines


def _notes(problem: Problem, runs: Sequence[Run], loop: str) -> list[str]:
    notes = []
    if loop == LIGHTNING:
        notes.append("Measured on Lightning's Trainer, whose own work between steps is in the seconds.")
    if isinstance(problem, Noisy) and math.isfinite(problem.noise_floor):
        notes.append(f"The noise of the targets leaves a perfect network a training loss of {problem.noise_floor:.4g}.")
    if problem.score in _MEANINGS:
        notes.append(_MEANINGS[problem.score])
    for run in runs:
        # A step is rarely the last to end on the dot; only steps that are long for the budget are worth a word.
        if run.overshoot_seconds > 0.02 * run.budget_seconds:
            notes.append(
                f"{run.optimizer}: its last step ended {run.overshoot_seconds:.1f} s after the budget of "
                f"{run.budget_seconds:g} s."
            )
        if not math.isfinite(run.final.losses[problem.score]):
            notes.append(f"{run.optimizer} diverged: its losses are not finite.")
    return notes
