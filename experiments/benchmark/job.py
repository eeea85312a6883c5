"""The jobs `optimizers` and `ablation` of scripts/benchmark.py: checked, run, saved after every run, and shown."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.benchmark import ablation, figures, report, store, suite, trials, tuning
from experiments.benchmark.measure import Row, Work, perform_all, recorded
from experiments.benchmark.overview import overview
from experiments.environment import UsageError, choose_device, describe, prepare_directory, require_extras
from experiments.problems import Problem, make, parameters_of

_QUICK_SECONDS = 0.5  # a budget that shows that everything runs, and nothing else
_QUICK_TRIALS = 2
_ALL = "all"


@dataclass(frozen=True, kw_only=True)
class Job:
    """What the user asks for.

    Attributes:
        problems: Names, or "all"; None: `suite.CORE`, or those of the ablation.
        optimizers: Contenders, or variations; None: those of `suite.contenders`, or all variations.
        seeds: One run a seed. Weights and rows depend on it. None: 0, 1 and 2; in a quick run 0 alone.
        threads: Of torch, in reported runs.
        device: "auto" or a torch device.
        out: Directory for what is written; None: runs/benchmark, or runs/ablation.
        quick: Budgets of half a second, two trials where contenders are tuned, and one process for all runs.
        tune: Find the contenders' settings instead of running them.
        jobs: Trials at a time; reported runs are always one at a time. 0: everything in this process, for tests.
        trials: How many of each grid are tried, its best guesses first; None: all.
        tuned: Where the settings are; None: the file in the package; what a quick search finds goes to `out`.
        fresh: Leave out the runs of earlier sittings.
        budget_seconds: Seconds of each run; None: the problem's.
        data_root: Where the files of data sets are; None: the usual place.
    """

    problems: Sequence[str] | None = None
    optimizers: Sequence[str] | None = None
    seeds: Sequence[int] | None = None
    threads: int = 2
    device: str = "cpu"
    out: Path | None = None
    quick: bool = False
    tune: bool = False
    jobs: int = 1
    trials: int | None = None
    tuned: Path | None = None
    fresh: bool = False
    budget_seconds: float | None = None
    data_root: Path | None = None

    def check(self) -> None:
        """Check what can be checked before a problem is made.

        Raises:
            UsageError: If a number makes no sense, or a file is not there.
        """
        if self.threads < 1:
            raise UsageError(f"--threads {self.threads} is none; give 1 or more")
        if self.jobs < 0:
            raise UsageError(f"--jobs {self.jobs} is negative; give the number of trials at a time")
        if self.trials is not None and self.trials < 1:
            raise UsageError(f"--trials {self.trials} tries nothing; give a positive number, or leave it out for all")
        if self.tuned is not None and not self.tune and not self.tuned.exists():
            raise UsageError(f"--tuned {str(self.tuned)!r} is no file; write it with --tune, or leave it out")
        for seed in self.all_seeds:
            if not 0 <= seed < 2**31:
                raise UsageError(f"--seeds {seed} is out of range; give integers from 0 to {2**31 - 1}")
            if seed == tuning.SEED:
                raise UsageError(f"--seeds {seed} is the seed of the tuning; report on others")
        if len(set(self.all_seeds)) < len(self.all_seeds):
            raise UsageError(f"--seeds {' '.join(map(str, self.all_seeds))} names a seed twice; name each once")
        budget = self.budget_seconds
        if budget is not None and not (math.isfinite(budget) and budget > 0):
            raise UsageError(f"--budget-seconds {budget:g} is no time to train; give a positive number")
        require_extras(["matplotlib", "sklearn"])

    @property
    def all_seeds(self) -> Sequence[int]:
        """The seeds, chosen or usual."""
        return self.seeds if self.seeds is not None else (0,) if self.quick else (0, 1, 2)

    def seconds(self, usual: float) -> float:
        """Give the budget of a run.

        Args:
            usual: That of the suite.

        Returns:
            Seconds.
        """
        return self.budget_seconds if self.budget_seconds is not None else _QUICK_SECONDS if self.quick else usual


def run_optimizers(job: Job) -> list[Row]:
    """Tune the contenders, or run them against each other.

    Args:
        job: What the user asks for.

    Returns:
        All rows of results.json; none where contenders are tuned.

    Raises:
        UsageError: Before any training, if something asked for is not possible.
    """
    job.check()
    device = str(choose_device(job.device))
    _check_names("--optimizers", job.optimizers, tuple(suite.CONTENDERS))
    problems = _problems(job, suite.CORE, device)
    contenders = {problem.name: suite.contenders(problem, job.optimizers) for problem in problems}
    if not any(contenders.values()):
        raise UsageError(f"--optimizers {' '.join(job.optimizers or ())} takes none of these problems; add others")
    out = prepare_directory(job.out if job.out is not None else Path("runs") / "benchmark")
    where = job.tuned or (out / tuning.TUNED.name if job.quick and job.tune else tuning.TUNED)
    tuned = tuning.load(where)
    if job.tune:
        for problem in problems:
            found = tuning.tune(
                problem,
                contenders[problem.name],
                budget_seconds=job.seconds(suite.BUDGETS[problem.name]),
                threads=job.threads,
                jobs=job.jobs,
                device=device,
                trials=_QUICK_TRIALS if job.quick else job.trials,
                data_root=job.data_root,
                say=_say,
            )
            tuned[problem.name] = tuned.get(problem.name, {}) | found
            tuning.save(where, tuned)
        for path in (where, *_show_trials(out, tuned, [problem.name for problem in problems])):
            _say(f"wrote {path}")
        return []
    works = []
    for problem in problems:
        names = contenders[problem.name]
        if job.optimizers is None and not job.quick and (problem.name in tuned or list(job.problems or ()) == [_ALL]):
            missing = [name for name in names if name not in tuned.get(problem.name, {})]
            names = [name for name in names if name not in missing]
            if missing:
                _say(f"{problem.name}: without {', '.join(missing)}, which nobody tuned there")
        for line in tuning.handicaps(tuned, problem.name, names, suite.OURS):
            _say(line)
        settings = {name: tuning.settings_of(name, problem, tuned, untuned=job.quick) for name in names}
        seconds = job.seconds(suite.BUDGETS[problem.name])
        works += _works(job, problem, settings, seconds, device)
    rows = _measure(job, works, out, device)
    shown = _show_trials(out, tuned, list(dict.fromkeys(row["problem"] for row in rows)))
    _finish(out, rows, f"{report.table(rows)}\n\n{overview(rows)}", shown)
    return rows


def _show_trials(out: Path, tuned: tuning.Tuned, problems: Sequence[str]) -> list[Path]:
    """Write what tuning tried, as a table and as a figure."""
    page = out / "trials.md"
    page.write_text(trials.table(tuned, problems) + "\n")
    return [page, trials.write_figure(out / "trials.png", tuned, problems)]


def run_ablation(job: Job) -> list[Row]:
    """Run the variations of HessianFree against each other.

    Args:
        job: What the user asks for; `tune` is not looked at.

    Returns:
        All rows of results.json.

    Raises:
        UsageError: Before any training, if something asked for is not possible.
    """
    job.check()
    device = str(choose_device(job.device))
    _check_names("--variations", job.optimizers, tuple(ablation.VARIATIONS))
    problems = _problems(job, ablation.PROBLEMS, device)
    tuned = tuning.load(job.tuned or tuning.TUNED)
    out = prepare_directory(job.out if job.out is not None else Path("runs") / "ablation")
    works = []
    for problem in problems:
        varied = ablation.variations(problem, tuned)
        # the ratio that the table is about needs the base, whatever else is asked for
        wanted = {
            name: settings
            for name, settings in varied.items()
            if job.optimizers is None or name in job.optimizers or name == ablation.BASE
        }
        works += _works(job, problem, wanted, job.seconds(ablation.BUDGET_SECONDS), device)
    rows = _measure(job, works, out, device)
    _finish(out, rows, report.ablation_table(rows, ablation.BASE))
    return rows


def _check_names(option: str, named: Sequence[str] | None, known: Sequence[str]) -> None:
    for name in named or ():
        if name not in known:
            raise UsageError(f"{option} {name!r} is unknown; choose from: {', '.join(known)}")


def _problems(job: Job, default: Sequence[str], device: str) -> list[Problem]:
    """Make the problems; of all there are, those whose data or packages are missing are named with the cure."""
    if job.problems is not None and _ALL in job.problems and len(job.problems) > 1:
        raise UsageError(
            f"--problems {' '.join(job.problems)} names more than {_ALL!r}, which holds the others; give it alone"
        )
    if job.problems is None or list(job.problems) != [_ALL]:
        _check_names("--problems", job.problems, (*suite.BUDGETS, _ALL))
        return [make(name, device, job.data_root) for name in dict.fromkeys(job.problems or default)]
    problems = []
    for name in suite.BUDGETS:
        try:
            problems.append(make(name, device, job.data_root))
        except UsageError as error:
            _say(f"{name}: absent: {error}")
    return problems


def _works(job: Job, problem: Problem, settings: dict[str, Any], seconds: float, device: str) -> list[Work]:
    """Order the runs by seed first: what disturbs the machine for a while disturbs all contenders."""
    parameters = parameters_of(problem)
    for one in settings.values():
        one.check(parameters)
    return [
        Work(
            problem=problem.name,
            optimizer=name,
            settings=one,
            seed=seed,
            budget_seconds=seconds,
            threads=job.threads,
            device=device,
            data_root=job.data_root,
            floor=name == suite.REFERENCE and not job.quick,
        )
        for seed in job.all_seeds
        for name, one in settings.items()
    ]


def _measure(job: Job, works: Sequence[Work], out: Path, device: str) -> list[Row]:
    """Make the runs that are not there yet one at a time, and save after each: who is stopped goes on from there."""
    path = out / "results.json"
    environment: dict[str, Any] = describe(choose_device(device)) | {"threads": job.threads, "cores": os.cpu_count()}
    rows = [] if job.fresh else store.load(path, environment, {work.problem: work.budget_seconds for work in works})
    planned = [
        {"problem": work.problem, "optimizer": work.optimizer, "seed": work.seed, "settings": recorded(work.settings)}
        for work in works
    ]
    store.check_settings(path, rows, planned)
    there = {(row["problem"], row["optimizer"], row["seed"]): row["settings"] for row in rows}
    left = [work for work in works if there.get((work.problem, work.optimizer, work.seed)) != recorded(work.settings)]
    if len(left) < len(works):
        _say(f"{len(works) - len(left)} runs of an earlier sitting stay as they are; --fresh makes all anew")
    _say(f"{len(left)} runs, {sum(work.budget_seconds for work in left):.0f} s of training, {job.threads} threads")
    for row in perform_all(left, min(job.jobs, 1), alone=not job.quick):
        rows = store.merge(rows, [row])
        store.save(path, environment, rows)
        final = "diverged" if row["final"] is None else f"{row['final']:.4g} after {row['steps']} steps"
        _say(f"{row['problem']}: {row['optimizer']}, seed {row['seed']}: {final}")
    return rows


def _finish(out: Path, rows: Sequence[Row], table: str, others: Sequence[Path] = ()) -> None:
    """Show what results.json says by now."""
    (out / "table.md").write_text(table + "\n")
    paths = [out / "results.json", out / "table.md"]
    for problem in dict.fromkeys(row["problem"] for row in rows):
        paths.append(
            figures.write_curves(out / f"curves-{problem}.png", [row for row in rows if row["problem"] == problem])
        )
    paths.append(figures.write_summary(out / "summary.png", rows))
    _say(f"\n{table}\n")
    for path in (*paths, *others):
        _say(f"wrote {path}")


def _say(line: str) -> None:
    print(line, flush=True)
