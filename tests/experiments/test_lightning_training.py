"""The same run by the plain loop and on Lightning's Trainer."""

import copy
from typing import Any

import pytest
import torch

from experiments import data
from experiments.optimizers import settings_class
from experiments.problems.flow import make_flow
from experiments.training import Budget, Task, Training, train

pytest.importorskip("lightning")
from experiments.lightning_training import train_on_lightning  # noqa: E402  (after the skip)

CPU = torch.device("cpu")


class Killed(Exception):
    pass


@pytest.mark.parametrize("optimizer", ["hessfree", "adam", "lbfgs"])
def test_same_losses_at_the_same_steps(optimizer: str) -> None:
    problem = make_flow("fixed" if optimizer == "lbfgs" else "raw", data.load("moons"), CPU, width=8)
    # of the many evaluations of L-BFGS in a step both loops report the first, and count all
    changes: dict[str, Any] = {"max_iterations": 5} if optimizer == "lbfgs" else {"batch_size": 3000}
    changes |= {"lr": 0.01} if optimizer == "adam" else {}
    settings = settings_class(optimizer, problem).for_problem(problem, **changes)
    seen: list[int] = []
    task = Task(problem, optimizer, settings, seed=3, budget=Budget(steps=8))
    plain, on_lightning = (
        make(task, watch=lambda training: seen.append(training.steps)) for make in (train, train_on_lightning)
    )
    assert seen == [*range(1, 9)] * 2

    def losses(run: Any) -> list[Any]:
        return [(p.step, p.samples, p.train_loss, p.losses) for p in run.points]

    assert losses(plain) == losses(on_lightning)
    assert all(torch.equal(tensor, on_lightning.weights[name]) for name, tensor in plain.weights.items())

    # rows are fetched ahead, and yet a run goes on with those of the next step
    states: list[Any] = []

    def watch(training: Training) -> None:
        if training.steps == 5:
            states.append(copy.deepcopy(training.state_dict()))
            raise Killed

    with pytest.raises(Killed):
        train_on_lightning(task, watch=watch)
    resumed = train_on_lightning(task, state=states[0])
    assert losses(resumed) == losses(plain)


def test_the_trainer_is_on_the_clock() -> None:
    problem = make_flow("raw", data.load("moons"), CPU, width=8)
    settings = settings_class("adam", problem).for_problem(problem, lr=0.01, batch_size=16)
    run = train_on_lightning(Task(problem, "adam", settings, seed=0, budget=Budget(0.05)))
    assert run.final.seconds >= 0.05 > run.points[-2].seconds
    assert run.final.step >= 1 and run.final.samples == 16 * run.final.step
