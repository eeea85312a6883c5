"""results.json: the runs of a benchmark, which grows over several sittings."""

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.benchmark.measure import Row
from experiments.benchmark.suite import REFERENCE
from experiments.environment import UsageError

_KEY = ("problem", "optimizer", "seed")


def load(path: Path, environment: dict[str, Any], budgets: dict[str, float]) -> list[Row]:
    """Read the runs of earlier sittings.

    Args:
        path: results.json.
        environment: What timings depend on, here and now.
        budgets: Seconds of the runs that are to come, by problem.

    Returns:
        The rows; none where there is no file.

    Raises:
        UsageError: If the file cannot be read, or its runs cannot be compared with those to come.
    """
    rows = read_rows(path, environment)
    for row in rows:
        if (seconds := budgets.get(row["problem"], row["budget_seconds"])) != row["budget_seconds"]:
            raise UsageError(
                f"{str(path)!r} holds runs of {row['budget_seconds']:g} s of {row['problem']}, and {seconds:g} s are "
                f"asked for: they cannot be compared; give another --out, or --fresh"
            )
    return rows


def read_rows(path: Path, environment: dict[str, Any]) -> list[Row]:
    """Read the rows of an earlier sitting.

    Args:
        path: results.json.
        environment: What timings depend on, here and now.

    Returns:
        The rows; none where there is no file.

    Raises:
        UsageError: If the file cannot be read, or was measured elsewhere.
    """
    if not path.exists():
        return []
    try:
        content = json.loads(path.read_text())
        rows, there = content["rows"], content["environment"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{str(path)!r} holds no results ({error}); give another --out, or --fresh") from None
    different = [name for name in sorted({*there, *environment}) if there.get(name) != environment.get(name)]
    if different:
        name = different[0]
        raise UsageError(
            f"{str(path)!r} was measured with {name} {there.get(name)!r}, and this is {environment.get(name)!r}: their "
            f"seconds cannot be compared; give another --out, or --fresh"
        )
    return rows


def check_settings(path: Path, rows: Sequence[Row], planned: Sequence[Row]) -> None:
    """Check that no earlier run stays beside runs of the same contender with other settings.

    Args:
        path: Where the rows are from.
        rows: Earlier runs.
        planned: Of each run to come the problem, optimizer, seed and settings.

    Raises:
        UsageError: If medians would be taken over runs of two kinds.
    """
    replaced = {tuple(one[name] for name in _KEY) for one in planned}
    settings = {(one["problem"], one["optimizer"]): one["settings"] for one in planned}
    for row in rows:
        now = settings.get((row["problem"], row["optimizer"]), row["settings"])
        if now != row["settings"] and tuple(row[name] for name in _KEY) not in replaced:
            raise UsageError(
                f"{str(path)!r} holds {row['optimizer']} on {row['problem']}, seed {row['seed']}, with "
                f"{row['settings']}, and now it has {now}: no median over both would mean anything; run that seed too "
                f"(--seeds), give another --out, or --fresh"
            )


def merge(rows: Sequence[Row], new: Sequence[Row]) -> list[Row]:
    """Put new runs among earlier ones; a run of the same problem, optimizer and seed gives way.

    Args:
        rows: Earlier runs. Not changed.
        new: Later ones.

    Returns:
        All, each with `seconds_to_adam_final`.
    """
    kept = {tuple(row[name] for name in _KEY): row for row in [*rows, *new]}
    marks = {(row["problem"], row["seed"]): row["final"] for row in kept.values() if row["optimizer"] == REFERENCE}
    return [
        row | {"seconds_to_adam_final": crossing(row["curve"], marks.get((row["problem"], row["seed"])))}
        for row in kept.values()
    ]


def crossing(curve: dict[str, list[Any]], mark: float | None) -> float | None:
    """Give the time from which on a run stays at or below a score.

    A dip that the run leaves again does not count: it cannot be known while training.

    Args:
        curve: "seconds" and "score" of the run; a score that is not finite is None.
        mark: The score to reach; None: there is none.

    Returns:
        Seconds of training, interpolated between the neighbours on the logarithm of the score; None: never.
    """
    if mark is None:
        return None
    seconds = curve["seconds"]
    scores = [math.inf if score is None else score for score in curve["score"]]
    above = max((index for index, score in enumerate(scores) if not score <= mark), default=-1)
    if above == len(scores) - 1:
        return None
    if above < 0:
        return seconds[0]
    high, low = scores[above], scores[above + 1]
    if not (math.isfinite(high) and low > 0):
        return seconds[above + 1]
    share = math.log(high / mark) / math.log(high / low)
    return seconds[above] + share * (seconds[above + 1] - seconds[above])


def save(path: Path, environment: dict[str, Any], rows: Sequence[Row]) -> Path:
    """Write results.json; whoever reads it meanwhile sees the old one whole.

    Args:
        path: The file.
        environment: What timings depend on.
        rows: The runs.

    Returns:
        The same path.
    """
    return write_json(path, {"environment": environment, "rows": list(rows)})


def write_json(path: Path, content: Any) -> Path:
    """Replace a JSON file in one go.

    Args:
        path: The file.
        content: Plain dicts, lists, finite numbers and strings.

    Returns:
        The same path.
    """
    beside = path.with_name(path.name + ".new")
    beside.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    os.replace(beside, path)
    return path
