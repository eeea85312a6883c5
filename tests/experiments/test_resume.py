"""A comparison that is stopped and goes on, against one that is not: equal to the last bit."""

import json
import os
import signal
import sys
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments import data
from experiments.checkpoint import Checkpoint, holds_unfinished
from experiments.earlier_run import set_aside
from experiments.environment import UsageError
from experiments.interruption import Interruption
from experiments.optimizers import OPTIMIZERS, settings_class
from experiments.paths import Paths
from experiments.problems.flow import make_flow
from experiments.records import Run, Trial
from experiments.training import Budget, Task, Training, train
from tests.experiments.scripts import main_of

CPU = torch.device("cpu")
SMALL = ["hessfree.batch_size=600", "adam.batch_size=50"]
STEPS = 6


class Killed(Exception):
    pass


@pytest.fixture
def ctrl_c() -> Generator[None]:
    """Let SIGINT raise KeyboardInterrupt, which a process started in the background may ignore from birth."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def losses(run: Run) -> list[Any]:
    return [(p.step, p.samples, p.train_loss, p.losses) for p in run.points]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_goes_on_where_it_was(optimizer: str, tmp_path: Path) -> None:
    target: Any = "fixed" if optimizer == "lbfgs" else "raw"
    problem = make_flow(target, data.load("moons"), CPU, width=8)
    changes: dict[str, Any] = {} if optimizer == "lbfgs" else {"batch_size": 300}
    kind = settings_class(optimizer, problem)
    if kind.lr_grid:
        changes |= {"lr": 0.01}
    settings = kind.for_problem(problem, **changes)
    task = Task(problem, optimizer, settings, seed=3, budget=Budget(steps=12))
    whole = train(task)
    path = tmp_path / "checkpoint.pt"
    checkpoint = Checkpoint(path, {})

    def watch(training: Training) -> None:
        checkpoint.watch(training)
        if training.steps == 7:
            raise Killed

    with pytest.raises(Killed):
        train(task, watch=watch)
    state = Checkpoint.load(path, {}).state_of(optimizer)
    assert state is not None and 0 < state["steps"] <= 7
    again = train(task, state=state)
    assert losses(again) == losses(whole)
    assert all(torch.equal(tensor, again.weights[name]) for name, tensor in whole.weights.items())


@pytest.mark.parametrize(
    "changes", [{"paths": Paths(sigma=0.1, times="logit-normal")}, {"target": "stable"}, {"target": "fixed"}]
)
def test_every_stream_goes_on_where_it_was(changes: dict[str, Any]) -> None:
    problem = make_flow(**{"target": "raw"} | changes, dataset=data.load("moons"), device=CPU)
    stream: Any = problem.stream(5)
    for n in (100, 8192, 3000):
        stream.draw(n)
        other: Any = problem.stream(0)
        other.load_state_dict(stream.state_dict())
        place = stream.state_dict()
        assert torch.equal(other.draw(500).u, stream.draw(500).u)
        stream.load_state_dict(place)
    fresh: Any = problem.stream(5)
    other = problem.stream(1)
    other.load_state_dict(fresh.state_dict())
    assert torch.equal(other.draw(10).x_t, fresh.draw(10).x_t)


@pytest.fixture(scope="module")
def main() -> Callable[[list[str]], int]:
    return main_of("train")


def curves(out: Path) -> list[Any]:
    runs = json.loads((out / "results.json").read_text())["runs"]
    return [(run["optimizer"], run["step"], run["train_loss"], run["excess_loss"], run["sweep"]) for run in runs]


FLAGS = [
    *("--budget-steps", str(STEPS), "--width", "8", "--sampler-steps", "2"),
    *("--optimizers", "hessfree", "adam", "--set", *SMALL),
]


def press(monkeypatch: pytest.MonkeyPatch, presses: dict[int, int]) -> None:
    """Press Ctrl-C so many times at the end of certain steps, counted from here on over all runs."""
    kept = Training.count
    counted = 0

    def count(self: Training, loss: torch.Tensor) -> None:
        nonlocal counted
        kept(self, loss)
        counted += 1
        for _ in range(presses.get(counted, 0)):
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Training, "count", count)


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_and_resume(
    main: Callable[[list[str]], int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert main([*FLAGS, "--out", str(tmp_path / "whole")]) == 0
    assert not holds_unfinished(tmp_path / "whole" / "checkpoint.pt")
    press(monkeypatch, {3: 1, STEPS + 2: 1})  # in the first run, and in the second trial of the sweep
    stopped = [*FLAGS, "--out", str(tmp_path / "stopped")]
    capsys.readouterr()
    assert main(stopped) == 130
    said = capsys.readouterr().out
    assert "To go on: python" in said and "--resume" in said and "checkpoint.pt" in said
    assert main([*stopped, "--resume"]) == 130
    assert main([*stopped, "--resume"]) == 0
    assert curves(tmp_path / "stopped") == curves(tmp_path / "whole")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    # what is done stays done, and other flags are another comparison
    capsys.readouterr()
    assert main([*stopped, "--resume", "--seed", "1"]) == 2
    assert "another seed" in capsys.readouterr().err


@pytest.mark.usefixtures("ctrl_c")
def test_two_ctrl_c_and_a_start_without_resume(
    main: Callable[[list[str]], int],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    press(monkeypatch, {2: 2, 4: 1})  # in the second step of each start
    flags = [*FLAGS, "--out", str(tmp_path)]
    assert main(flags) == 130
    said = capfd.readouterr()
    assert "stops after this step; a second Ctrl-C stops at once" in said.err and said.err.endswith(
        "train.py: stopped\n"
    )
    assert "stopped at once" in said.out and "To go on: python" in said.out and "--resume" in said.out
    (tmp_path / "results.json").write_text("of another run")
    assert main(flags) == 130
    said = capfd.readouterr()
    kept = tmp_path / "checkpoint.old.pt"
    assert str(kept) in said.out and "--resume" in said.out.partition("\n")[0]
    assert torch.load(kept, weights_only=True)["running"]["state"]["steps"] == 1  # when it was saved last
    assert not (tmp_path / "results.json").exists()
    assert (tmp_path / "results.old.json").read_text() == "of another run"


def test_only_unfinished_work_is_set_aside(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    said: list[str] = []
    checkpoint = Checkpoint(path, {})
    checkpoint.save()
    set_aside(tmp_path, path, said.append)  # nothing was done
    checkpoint.add_trial("adam", Trial(0.1, 1.0))
    checkpoint.finish()
    set_aside(tmp_path, path, said.append)
    assert path.exists() and not said
    for name in ("checkpoint.old.pt", "checkpoint.old2.pt"):
        unfinished = Checkpoint(path, {})
        unfinished.add_trial("adam", Trial(0.1, 1.0))
        set_aside(tmp_path, path, said.append)
        assert not path.exists() and name in said[-1]
        assert Checkpoint.load(tmp_path / name, {}).trials_of("adam") == [Trial(0.1, 1.0)]
    path.write_bytes(b"nothing")
    set_aside(tmp_path, path, said.append)
    assert (tmp_path / "checkpoint.old3.pt").read_bytes() == b"nothing"


@pytest.mark.usefixtures("ctrl_c")
def test_the_second_ctrl_c_acts_as_usual() -> None:
    with Interruption() as interruption:
        os.kill(os.getpid(), signal.SIGINT)
        assert interruption.requested
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.usefixtures("ctrl_c")
def test_what_lightning_makes_of_the_second_ctrl_c() -> None:
    with pytest.raises(KeyboardInterrupt), Interruption():
        os.kill(os.getpid(), signal.SIGINT)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        sys.exit(1)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with pytest.raises(SystemExit), Interruption():
        sys.exit(1)


def test_a_damaged_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "checkpoint.pt").write_bytes(b"nothing")
    with pytest.raises(UsageError, match="cannot be read.*leave --resume out"):
        Checkpoint.load(tmp_path / "checkpoint.pt", {})
