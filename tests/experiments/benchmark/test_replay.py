"""The same seed and the same course give the same losses to the last bit, whoever trains."""

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from experiments import training
from experiments.benchmark import measure, replay
from experiments.benchmark.measure import Row, Work, perform
from experiments.benchmark.suite import CONTENDERS
from experiments.environment import UsageError
from experiments.problems import Problem, make
from tests.experiments.benchmark.rows import row
from tests.experiments.scripts import main_of


@pytest.fixture(scope="module")
def small() -> dict[str, Problem]:
    """Fields in two dimensions by networks that are narrow enough for a dense matrix."""
    made: dict[str, Any] = {name: make(name) for name in ("8gaussians", "8gaussians-fixed")}
    return {name: dataclasses.replace(problem, width=12) for name, problem in made.items()}


def set_clock(monkeypatch: pytest.MonkeyPatch, every: Callable[[int], float]) -> None:
    """Let reading number k of the clock say this."""
    numbers: Iterator[int] = iter(range(10**6))
    # the loop's clock alone: optimizers look at the time too
    monkeypatch.setattr(training, "time", SimpleNamespace(perf_counter=lambda: every(next(numbers))))


@pytest.mark.filterwarnings("ignore:K-FAC declines:UserWarning")
@pytest.mark.parametrize("name", CONTENDERS)
def test_every_contender_can_be_repeated(name: str, small: dict[str, Problem], monkeypatch: pytest.MonkeyPatch) -> None:
    problem = small["8gaussians-fixed" if name == "lbfgs" else "8gaussians"]
    monkeypatch.setattr(measure, "_problem", lambda *_: problem)
    changes = dict(CONTENDERS[name].grid(problem)[0])
    changes |= {key: min(changes[key], 256) for key in ("batch_size", "curvature_batch") if key in changes}
    settings = CONTENDERS[name].settings(problem, **changes)
    work = Work(problem=problem.name, optimizer=name, settings=settings, seed=3, budget_seconds=14.0, threads=1)
    set_clock(monkeypatch, float)  # what is inside takes a second
    first = perform(work)
    assert first["steps"] == 13 and len(first["curve"]["score"]) > 8
    assert all(score is not None for score in first["curve"]["score"])
    set_clock(monkeypatch, lambda k: 3.0 * k + (k % 5) / 10)  # a slower machine, and an uneven one
    again = perform(dataclasses.replace(work, pace=tuple(map(int, first["pace"].split()))))
    assert replay.difference(first, again) is None and again["steps"] == 13
    assert again["seconds"] > 2 * first["seconds"]
    other = perform(dataclasses.replace(work, seed=4, pace=tuple(map(int, first["pace"].split()))))
    assert replay.difference(first, other) is not None


def test_differences_are_found() -> None:
    first: Row = row("moons", "adam", 0, [8.0, 2.0, 1.0])
    assert replay.difference(first, json.loads(json.dumps(first))) is None
    assert "0.5 after 1280 rows in the place of 1.0" in str(
        replay.difference(first, row("moons", "adam", 0, [8.0, 2.0, 0.5]))
    )
    assert replay.difference(first, row("moons", "adam", 0, [8.0, 2.0])) == "2 points in the place of 3"
    assert "in the place of {}" in str(replay.difference(first, first | {"losses": {"excess_loss": 1.0}}))


def test_runs_of_the_benchmark_are_repeated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main = main_of("benchmark")
    only = ["--problems", "moons", "--out", str(tmp_path), "--jobs", "0"]
    quick = ["--quick", "--threads", "1", "--budget-seconds", "0.2"]
    assert main(["optimizers", *quick, *only, "--optimizers", "adam"]) == 0
    assert main(["replay", *only]) == 0
    assert "1 of 1 runs are the same to the last bit" in capsys.readouterr().out
    path = tmp_path / "results.json"
    content = json.loads(path.read_text())
    content["rows"][0]["curve"]["score"][-1] *= 1.0000001
    path.write_text(json.dumps(content))
    assert main(["replay", *only]) == 2
    assert "1 of 1 runs differ" in capsys.readouterr().err
    with pytest.raises(UsageError, match="no finished run of that kind"):
        replay.run(replay.ReplayJob(out=tmp_path, seeds=[7]))
    with pytest.raises(UsageError, match="holds no results"):
        replay.run(replay.ReplayJob(out=tmp_path / "nowhere"))
    content["rows"][0]["settings"]["lr"] = 7.0
    path.write_text(json.dumps(content))
    with pytest.raises(UsageError, match="would run with.*today"):
        replay.run(replay.ReplayJob(out=tmp_path, jobs=0))
