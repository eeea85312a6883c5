"""Every contender's grid is tried with the same seconds a trial, on a seed that is never reported.

Trials are scored as the reported runs are, on the same held-out rows where a problem has some.
"""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from experiments.benchmark.grids import Changes
from experiments.benchmark.measure import Work, perform_all
from experiments.benchmark.store import write_json
from experiments.benchmark.suite import CONTENDERS
from experiments.environment import UsageError
from experiments.optimizers import Settings
from experiments.problems import Problem

TUNED = Path(__file__).with_name("tuned.json")  # the settings that the published results were made with
SEED = 1000
SHARE = 0.4  # of the budget, for each trial, with a full schedule

Tuned = dict[str, dict[str, Any]]  # by problem, by contender: what was chosen, and every trial


def tune(
    problem: Problem,
    names: Sequence[str],
    *,
    budget_seconds: float,
    threads: int,
    jobs: int,
    device: str = "cpu",
    trials: int | None = None,
    data_root: Path | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Try the grid of each contender on a problem.

    Args:
        problem: What is solved.
        names: The contenders.
        budget_seconds: Of a reported run; a trial gets `SHARE` of it.
        threads: Of a reported run; where several trials run at a time they share them.
        jobs: Trials at a time; 0: in this process.
        device: Where the training runs.
        trials: How many of the grid are tried; None: all.
        data_root: Where the files of data sets are; None: the usual place.
        say: Prints a line of progress.

    Returns:
        For each contender the chosen changes and the record of the trials; a trial that diverged has no score.

    Raises:
        UsageError: If all trials of a contender diverged.
    """
    threads = max(1, threads // max(1, jobs))
    record: dict[str, Any] = {}
    for name in names:
        contender = CONTENDERS[name]
        grid = list(contender.grid(problem))[:trials]
        works = [
            Work(
                problem=problem.name,
                optimizer=name,
                settings=contender.settings(problem, **changes),
                seed=SEED,
                budget_seconds=SHARE * budget_seconds,
                threads=threads,
                device=device,
                data_root=data_root,
            )
            for changes in grid
        ]
        scores: list[float | None] = []
        for changes, row in zip(grid, perform_all(works, jobs), strict=True):
            scores.append(row["final"])
            say(f"{problem.name}: {name} with {written(changes)}: {_score(row['final'])} after {row['steps']} steps")
        best = min(range(len(grid)), key=lambda k: math.inf if (score := scores[k]) is None else score)
        if scores[best] is None:
            raise UsageError(f"{name} diverged on {problem.name} with all of its grid; widen it in grids.py")
        edges = at_edge(grid[best], grid)
        warning = f" (at the edge of its grid: {', '.join(edges)})" if edges else ""
        say(f"{problem.name}: {name} takes {written(grid[best])}{warning}")
        record[name] = {
            "chosen": grid[best],
            "at_edge": edges,
            "seed": SEED,
            "budget_seconds": SHARE * budget_seconds,
            "threads": threads,
            "trials": [{"changes": c, "score": s} for c, s in zip(grid, scores, strict=True)],
        }
    return record


def at_edge(chosen: Changes, grid: Sequence[Changes]) -> list[str]:
    """Name the settings that might be better still beyond the grid.

    Args:
        chosen: One of the grid.
        grid: All that were tried.

    Returns:
        Those settings with the smallest or the largest of three or more values.
    """
    values = {name: {changes[name] for changes in grid} for name in chosen}
    return [name for name in chosen if len(values[name]) > 2 and chosen[name] in {min(values[name]), max(values[name])}]


def handicaps(tuned: Tuned, problem: str, names: Sequence[str], ours: str) -> list[str]:
    """Say which rivals were tuned with less than ours was.

    Args:
        tuned: The record of tuning.
        problem: Name of the problem.
        names: The contenders that run on it.
        ours: With whose trials the others' are compared.

    Returns:
        A line a rival with fewer trials, shorter ones, or fewer threads.
    """
    known = tuned.get(problem, {})
    if ours not in known or ours not in names:
        return []
    mine: dict[str, Any] = known[ours]
    lines = []
    for name in names:
        one: dict[str, Any] = known.get(name, mine)
        for what, its, own in (
            ("trials", len(one["trials"]), len(mine["trials"])),
            ("seconds a trial", one["budget_seconds"], mine["budget_seconds"]),
            ("threads", one["threads"], mine["threads"]),
        ):
            if its < own:
                lines.append(f"{problem}: {name} was tuned with {its:g} {what}, {ours} with {own:g}")
    return lines


def written(changes: Changes) -> str:
    """Write settings as one reads them.

    Args:
        changes: Values by name.

    Returns:
        "lr 0.01, batch_size 256".
    """
    return ", ".join(f"{name} {value:g}" for name, value in changes.items()) or "the defaults"


def _score(score: float | None) -> str:
    return "diverged" if score is None else f"{score:.4g}"


def load(path: Path = TUNED) -> Tuned:
    """Read what was chosen.

    Args:
        path: A file that `save` wrote.

    Returns:
        The record; empty where there is no file.

    Raises:
        UsageError: If the file holds something else.
    """
    if not path.exists():
        return {}
    try:
        tuned = json.loads(path.read_text())
        fits = all(isinstance(one["chosen"], dict) for of_one in tuned.values() for one in of_one.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        fits = False
    if not fits:
        raise UsageError(f"{str(path)!r} holds no tuned settings; remove it, and write it anew with --tune")
    return tuned


def save(path: Path, tuned: Tuned) -> Path:
    """Write what was chosen.

    Args:
        path: The file.
        tuned: The record.

    Returns:
        The same path.
    """
    return write_json(path, tuned)


def settings_of(name: str, problem: Problem, tuned: Tuned, *, untuned: bool = False) -> Settings:
    """Give the settings that a contender is run with.

    Args:
        name: The contender.
        problem: What is solved.
        tuned: What was chosen.
        untuned: Whether the best guess will do where nothing was chosen.

    Returns:
        The settings.

    Raises:
        UsageError: If nothing was chosen, or what was chosen is no setting any more.
    """
    contender = CONTENDERS[name]
    known = tuned.get(problem.name, {}).get(name)
    if known is None and not untuned:
        raise UsageError(
            f"{name} has not been tuned on {problem.name}, and would be a straw man; run with --tune "
            f"--problems {problem.name} --optimizers {name}"
        )
    changes = known["chosen"] if known is not None else contender.grid(problem)[0]
    try:
        return contender.settings(problem, **changes)
    except TypeError as error:
        raise UsageError(f"what was tuned for {name} on {problem.name} does not fit ({error}); run --tune") from None
