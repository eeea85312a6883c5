import math

import pytest
import torch

from experiments import comparison, data
from experiments.checkpoint import Checkpoint
from experiments.comparison import compare, sweep
from experiments.optimizers import AdamSettings, choose_settings
from experiments.problems import Problem
from experiments.problems.flow import FlowMatching
from experiments.records import Budget, Point, Run
from experiments.training import Task


@pytest.fixture(scope="module")
def problem() -> Problem:
    return FlowMatching.of(data.load("moons"), torch.device("cpu"))


def test_sweep_uses_another_seed_and_less_time(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[float | None, int, float]] = []

    def train(task: Task, **how: object) -> Run:
        calls.append((task.settings.lr, task.seed, task.budget.seconds))
        point = Point(1, 1, 1.0, 1.0, {"excess_loss": abs(task.settings.lr - 1e-2), "holdout_loss": 1.0})  # type: ignore[operator]
        return Run(task.name, task.settings, task.seed, task.budget.seconds, (point, point))

    monkeypatch.setattr(comparison, "train", train)
    budget, nothing = Budget(8.0), Checkpoint(None, {})
    trials = sweep(problem, "adam", AdamSettings(), seed=5, budget=budget, trainer=train, checkpoint=nothing)
    assert calls == [(lr, 1005, 2.0) for lr in (1e-3, 3e-3, 1e-2, 3e-2)]
    assert min(trials, key=lambda trial: trial.score).lr == 1e-2
    lines: list[str] = []
    [run] = compare(problem, {"adam": AdamSettings()}, seed=5, budget=budget, say=lines.append)
    assert run.settings.lr == 1e-2 and run.seed == 5
    assert len(run.sweep) == 4
    assert "seed 1005" in lines[0] and "takes 0.01" in lines[0]
    calls.clear()
    compare(problem, {"adam": AdamSettings(lr=0.5)}, seed=5, budget=budget, say=lines.append)
    assert calls == [(0.5, 5, 8.0)]


def test_a_diverged_trial_is_not_taken(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    def train(task: Task, **how: object) -> Run:
        score = 1.0 if task.settings.lr == 3e-3 else math.nan
        point = Point(1, 1, 1.0, score, {"excess_loss": score, "holdout_loss": score})
        return Run(task.name, task.settings, 0, 1.0, (point, point))

    monkeypatch.setattr(comparison, "train", train)
    [run] = compare(problem, {"adam": AdamSettings()}, seed=0, budget=Budget(1.0), say=lambda line: None)
    assert run.settings.lr == 3e-3


def test_all_start_from_the_same_weights_and_rows(problem: Problem) -> None:
    names = ["hessfree", "dense-fisher", "adam"]
    changes = [f"{name}.batch_size=16" for name in names] + ["adam.lr=0.01"]
    seen: list[tuple[str, Point]] = []
    runs = compare(
        problem,
        choose_settings(names, changes, problem),
        seed=1,
        budget=Budget(1e-3),
        observers=[lambda name, point, model: seen.append((name, point))],
        say=lambda line: None,
    )
    assert [run.optimizer for run in runs] == names
    starts = {(run.points[0].train_loss, *run.points[0].losses.values()) for run in runs}
    assert len(starts) == 1
    for run in runs:
        # The first step reports the loss before it: of the same rows at the same weights.
        assert run.points[1].step == 1
        assert run.points[1].train_loss == pytest.approx(run.points[0].train_loss, rel=1e-5)
        assert run.points[1].losses["excess_loss"] != run.points[0].losses["excess_loss"]
    assert [name for name, _ in seen] == [name for name in names for _ in range(2)]
    assert runs[0].final.internals and not runs[2].final.internals
