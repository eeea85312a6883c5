"""What a comparison leaves behind: results.json, TensorBoard scalars, and a table to read in the terminal."""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.environment import UsageError, describe
from experiments.problems import Noisy, Problem
from experiments.training import Point, Run

_SCORES = {"holdout_loss": "held-out loss"}  # where the name in words is not the key's
_MEANINGS = {
    "excess_loss": "Excess loss is what a network adds to it: mean (v - E[u | x_t, t])² on fixed points.",
    "fixed_excess": "Fixed excess is mean (v - E[u | x_t, t])² on the rows of the training, which have no noise.",
    "train_excess": "Train excess is the training loss on all rows, less what it is for a perfect network.",
    "train_objective": "Train objective is the training loss on all rows.",
}
_REFERENCE = "adam"


def score_name(score: str) -> str:
    """Give the name of a figure in words.

    Args:
        score: A key of a problem's `evaluate`.

    Returns:
        The words.
    """
    return _SCORES.get(score, score.replace("_", " "))


def as_json(problem: Problem, runs: Sequence[Run]) -> dict[str, Any]:
    """Arrange the results as lists of numbers.

    Args:
        problem: What was solved.
        runs: One an optimizer.

    Returns:
        Plain dicts and lists. Seconds and losses are lists of equal length, from the start to the end of a run;
        a number that is not finite is None.
    """
    return _finite({
        "data": problem.name,
        "dim": problem.dim,
        "score": problem.score,
        **({"noise_floor": problem.noise_floor} if isinstance(problem, Noisy) else {}),
        "environment": describe(problem.device),
        "runs": [_run_as_json(run) for run in runs],
    })


def _run_as_json(run: Run) -> dict[str, Any]:
    rows = [_row(point) for point in run.points]
    return {
        "optimizer": run.optimizer,
        "settings": _settings(run),
        "seed": run.seed,
        "budget_seconds": run.budget_seconds,
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


def write_json(path: Path, problem: Problem, runs: Sequence[Run]) -> Path:
    """Write results.json.

    Args:
        path: The file.
        problem: What was solved.
        runs: One an optimizer.

    Returns:
        The same path.
    """
    path.write_text(json.dumps(as_json(problem, runs), indent=1, allow_nan=False) + "\n")
    return path


class TensorBoardLog:
    """Scalars for TensorBoard while training goes on: one run an optimizer, the same tags in each.

    The wall time of an event is the moment the log was opened plus the seconds of *training*, so that TensorBoard's
    "relative" axis compares optimizers at equal training time although they ran one after the other.
    """

    def __init__(self, directory: Path, optimizers: Sequence[str], now: float) -> None:
        """Open one writer an optimizer; the events of an earlier comparison in the same place make way.

        Args:
            directory: What `tensorboard --logdir` is to be given.
            optimizers: Their names.
            now: Seconds since the epoch, from which the relative axis counts.

        Raises:
            UsageError: If the directory cannot be written.
        """
        from torch.utils.tensorboard import SummaryWriter

        self._now = now
        self._writers = {}
        try:
            for name in optimizers:
                for old in (directory / name).glob("events.out.tfevents.*"):
                    old.unlink()
                self._writers[name] = SummaryWriter(str(directory / name))
        except OSError as error:
            raise UsageError(f"--out: {str(directory)!r} cannot be written ({error.strerror}); give another") from None

    def __call__(self, optimizer: str, point: Point) -> None:
        """Write one point of a run.

        Args:
            optimizer: The run.
            point: Its losses, and what the optimizer reports of itself.
        """
        writer = self._writers[optimizer]
        scalars = {
            "loss/train": point.train_loss,
            **{f"loss/{name.removesuffix('_loss')}": value for name, value in point.losses.items()},
            "progress/samples": float(point.samples),
            "progress/training_seconds": point.seconds,
            # NaN there means "not needed at this step"; among the losses it means divergence, and is shown.
            **{tag: value for tag, value in point.internals.items() if math.isfinite(value)},
        }
        for tag, value in scalars.items():
            writer.add_scalar(tag, value, global_step=point.step, walltime=self._now + point.seconds)
        writer.flush()

    def close(self) -> None:
        """Close the writers; what they wrote stays."""
        for writer in self._writers.values():
            writer.close()


def table(problem: Problem, runs: Sequence[Run]) -> str:
    """Arrange the ends of the runs as text.

    Args:
        problem: What was solved.
        runs: One an optimizer.

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
    return "\n".join([*_aligned(rows), "", *_notes(problem, runs)])


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


def _notes(problem: Problem, runs: Sequence[Run]) -> list[str]:
    notes = []
    if isinstance(problem, Noisy):
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
