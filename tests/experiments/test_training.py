import math
import time
from typing import Any, ClassVar

import pytest
import torch

from experiments import data, flow_matching, training
from experiments.flow_matching import Batch
from experiments.optimizers import AdamSettings, settings_class
from experiments.problems import Problem
from experiments.problems.flow import FixedFlowMatching, FlowMatching
from experiments.training import Budget, Point, Run, Stopwatch, Task, evaluation_times, train

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def problem() -> Problem:
    return FlowMatching.of(data.load("8gaussians"), CPU)


@pytest.fixture
def ticks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock on which everything between two readings takes one second."""
    seconds = iter(range(10**6))
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(seconds)))


def test_evaluation_times() -> None:
    times = evaluation_times(10)
    assert times[0] == pytest.approx(0.1) and times[-1] == 10
    assert times == sorted(times)


def test_only_what_is_inside_counts(ticks: None) -> None:
    watch = Stopwatch(CPU)
    with watch:
        pass
    time.perf_counter()
    with watch:
        time.perf_counter()
    assert watch.seconds == 3


def test_initial_weights_depend_on_the_seed_alone(problem: Problem) -> None:
    state = torch.get_rng_state()
    first, second, other = (problem.initial_model(seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    pairs = list(zip(first.parameters(), second.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(a, b) and not torch.equal(a, c) for a, b, c in pairs)


def test_a_run_by_ticks(problem: Problem, ticks: None) -> None:
    seen: list[tuple[str, Point]] = []
    task = Task(
        problem,
        "adam",
        AdamSettings(lr=0.01, batch_size=64),
        seed=0,
        budget=Budget(9.5),
        moments=[float(second) for second in range(2, 10)],
        observer=lambda name, point, model: seen.append((name, point)),
    )
    run = train(task)
    # One second to build, then one a step; the budget ends inside the ninth, and evaluations cost nothing.
    assert [point.seconds for point in run.points] == [float(second) for second in range(1, 11)]
    assert [point.step for point in run.points] == list(range(10))
    assert run.final.samples == 9 * 64
    assert run.overshoot_seconds == 0.5
    assert seen == [("adam", point) for point in run.points]
    assert all(math.isfinite(point.train_loss) for point in run.points)


def test_two_points_at_least(problem: Problem, ticks: None) -> None:
    run = train(Task(problem, "adam", AdamSettings(lr=0.01), seed=0, budget=Budget(0.001)))
    assert [point.step for point in run.points] == [0, 1]
    # The loss at the start is that of the batch of the first step.
    assert run.points[0].train_loss == run.points[1].train_loss


def test_same_seed_same_run(problem: Problem, ticks: None) -> None:
    settings = AdamSettings(lr=0.01, batch_size=128)
    tasks = (Task(problem, "adam", settings, seed=seed, budget=Budget(5)) for seed in (3, 3, 4))
    first, second, other = map(train, tasks)
    losses = [[(p.train_loss, p.losses) for p in run.points] for run in (first, second, other)]
    assert losses[0] == losses[1] and losses[0] != losses[2]


def test_training_helps(problem: Problem, ticks: None) -> None:
    run = train(Task(problem, "adam", AdamSettings(lr=0.01), seed=0, budget=Budget(60), moments=()))
    assert len(run.points) == 2
    assert run.final.losses["excess_loss"] < 0.5 * run.points[0].losses["excess_loss"]


def test_learning_rates_follow_the_budget(problem: Problem, ticks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []
    plain_step = torch.optim.Adam.step

    def step(self: torch.optim.Adam, closure: object = None) -> object:
        rates.append(self.param_groups[0]["lr"])
        return plain_step(self, closure)  # type: ignore[call-overload]

    monkeypatch.setattr(torch.optim.Adam, "step", step)
    for final_length in (0.0, 1.0):
        rates.clear()
        settings = AdamSettings(lr=0.01, final_length=final_length)
        train(Task(problem, "adam", settings, seed=0, budget=Budget(4)))
        assert rates == pytest.approx([0.01 * settings.step_length(second / 4) for second in (0, 2, 3)])
    assert rates == [0.01] * 3


def test_full_batches_are_the_same_tensors(ticks: None) -> None:
    batches: list[object] = []

    class Watched(FixedFlowMatching):
        def loss(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
            batches.append(batch)
            return super().loss(model, batch)

    watched = Watched.of(data.load("8gaussians"), CPU)
    settings = AdamSettings(lr=0.01, batch_size=watched.fixed.x_t.shape[0])
    run = train(Task(watched, "adam", settings, seed=0, budget=Budget(4), moments=()))
    assert all(batch is watched.fixed for batch in batches) and len(batches) >= run.final.step >= 3
    assert set(run.final.losses) == {"fixed_excess", "excess_loss"}
    assert run.points[0].train_loss == pytest.approx(run.points[0].losses["fixed_excess"])


def test_internals_come_from_the_report(problem: Problem) -> None:
    class Report:
        def scalars(self, prefix: str) -> dict[str, float]:
            return {f"{prefix}damping": 0.5}

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
    assert training._internals(optimizer) == {}
    optimizer.last_step = None  # type: ignore[attr-defined]
    assert training._internals(optimizer) == {}
    optimizer.last_step = Report()  # type: ignore[attr-defined]
    assert training._internals(optimizer) == {"optimizer/damping": 0.5}


class Counted(FixedFlowMatching):
    """Knows the rows of every loss."""

    seen: ClassVar[list[int]] = []

    def loss(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        self.seen.append(len(batch))
        return super().loss(model, batch)


def counted_run(name: str, steps: int, **changes: Any) -> tuple[Run, list[int]]:
    """Train on 4096 fixed rows; give the rows of each of its evaluations too."""
    problem = Counted.of(data.load("8gaussians"), CPU, width=8)
    settings = settings_class(name, problem).for_problem(problem, **changes)
    Counted.seen.clear()
    run = train(Task(problem, name, settings, seed=0, budget=Budget(steps=steps), moments=()))
    # `evaluate` asks for the loss at the start and at the end
    return run, Counted.seen[2:-1]


def test_every_evaluation_of_lbfgs_counts() -> None:
    run, seen = counted_run("lbfgs", 2, max_iterations=5)
    assert len(seen) > 2 and run.final.step == 2
    assert run.final.samples == sum(seen) == len(seen) * 4096


def test_replays_do_not_count(problem: Problem) -> None:
    calls = 0

    def loss(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return flow_matching.loss(model, batch)

    settings = settings_class("hessfree", problem).for_problem(problem, batch_size=256, curvature_batch=64)
    task = Task(problem, "hessfree", settings, seed=0, budget=Budget(steps=6), moments=())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(problem), "loss", lambda self, model, batch: loss(model, batch))
        run = train(task)
    assert calls > 1 + run.final.step  # one at the start, and tests of the damping beside the steps'
    assert run.final.samples == 6 * 256


@pytest.mark.parametrize(("asked", "rows"), [(10**6, 4096), (100, 100)])
def test_rows_that_do_not_exist_do_not_count(asked: int, rows: int) -> None:
    run, seen = counted_run("adam", 3, lr=0.01, batch_size=asked)
    assert seen == [rows] * 3 and run.final.samples == 3 * rows
