"""The runs of results.json made once more, step by step as they were: are the losses the same to the last bit?"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.benchmark import suite, tuning
from experiments.benchmark.measure import Row, Work, perform_all, recorded
from experiments.environment import UsageError
from experiments.problems import make


@dataclass(frozen=True, kw_only=True)
class ReplayJob:
    """What the user asks for.

    Attributes:
        out: The directory with results.json; None: runs/benchmark.
        problems: Whose runs are repeated; None: all.
        optimizers: Contenders whose runs are repeated; None: all.
        seeds: Of the runs that are repeated; None: all.
        tuned: Where the settings are; None: the file in the package.
        jobs: 1: each run in a process of its own; 0: everything in this one, for tests.
        data_root: Where the files of data sets are; None: the usual place.
    """

    out: Path | None = None
    problems: Sequence[str] | None = None
    optimizers: Sequence[str] | None = None
    seeds: Sequence[int] | None = None
    tuned: Path | None = None
    jobs: int = 1
    data_root: Path | None = None


def run(job: ReplayJob) -> int:
    """Repeat runs, and compare them.

    Args:
        job: What the user asks for.

    Returns:
        How many runs were repeated; all had the losses of their originals at every point.

    Raises:
        UsageError: If there is nothing to repeat, a run was made with other settings than those of today, or a run
            differs from its original.
    """
    if job.jobs < 0:
        raise UsageError(f"--jobs {job.jobs} is negative; give 1, or 0 for everything in this process")
    path = (job.out if job.out is not None else Path("runs") / "benchmark") / "results.json"
    try:
        content = json.loads(path.read_text())
        rows = [row for row in content["rows"] if _wanted(job, row)]
        environment = content["environment"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{str(path)!r} holds no results ({error}); give the --out of a benchmark") from None
    if not rows:
        raise UsageError(f"{str(path)!r} has no finished run of that kind; name others, or none for all")
    tuned = tuning.load(job.tuned or tuning.TUNED)
    works = [_work(row, tuned, environment, job.data_root) for row in rows]
    different = 0
    for row, again in zip(rows, perform_all(works, job.jobs), strict=True):
        what = difference(row, again)
        different += what is not None
        name = f"{row['problem']}: {row['optimizer']}, seed {row['seed']}"
        points = len(row["curve"]["score"])
        print(f"{name}: {what or f'the same to the last bit at {points} points'}", flush=True)
    if different:
        raise UsageError(f"{different} of {len(rows)} runs differ from {str(path)!r}; run on the machine that wrote it")
    print(f"{len(rows)} of {len(rows)} runs are the same to the last bit", flush=True)
    return len(rows)


def _wanted(job: ReplayJob, row: Row) -> bool:
    chosen = ((job.problems, "problem"), (job.optimizers, "optimizer"), (job.seeds, "seed"))
    return bool(row.get("pace")) and all(names is None or row[key] in names for names, key in chosen)


def _work(row: Row, tuned: tuning.Tuned, environment: dict[str, Any], data_root: Path | None) -> Work:
    """Say how a run is made again."""
    name = row["optimizer"]
    if name not in suite.CONTENDERS:
        raise UsageError(f"{name!r} of an ablation cannot be repeated from its record; name --optimizers of the suite")
    problem = make(row["problem"], environment["device"], data_root)
    settings = tuning.settings_of(name, problem, tuned, untuned=True)
    if recorded(settings) != row["settings"]:
        raise UsageError(
            f"{name} ran on {row['problem']} with {row['settings']}, and would run with {recorded(settings)} today; "
            f"give the --tuned of that run"
        )
    return Work(
        problem=row["problem"],
        optimizer=name,
        settings=settings,
        seed=row["seed"],
        budget_seconds=row["budget_seconds"],
        threads=environment["threads"],
        device=environment["device"],
        data_root=data_root,
        pace=tuple(map(int, row["pace"].split())),
    )


def difference(row: Row, again: Row) -> str | None:
    """Find where two runs part.

    Args:
        row: A run.
        again: The same run, repeated.

    Returns:
        Words; None if all losses are the same numbers at the same steps.
    """
    first, second = (list(zip(one["curve"]["samples"], one["curve"]["score"], strict=True)) for one in (row, again))
    if len(first) != len(second):
        return f"{len(second)} points in the place of {len(first)}"
    for (samples, score), (samples_again, score_again) in zip(first, second, strict=True):
        if (samples, score) != (samples_again, score_again):
            return f"{score_again!r} after {samples_again} rows in the place of {score!r} after {samples}"
    return None if row["losses"] == again["losses"] else f"{again['losses']} in the place of {row['losses']}"
