import io
import sys
from typing import Any

import pytest
import torch

from experiments import data
from experiments.optimizers import settings_class
from experiments.problems.flow import make_flow
from experiments.progress import Progress
from experiments.training import Budget, Task, train


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("terminal", [True, False])
def test_a_bar_where_somebody_looks(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = make_flow("raw", data.load("moons"), torch.device("cpu"), width=8)
    settings: Any = settings_class("hessfree", problem).for_problem(problem, batch_size=300)
    screen = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", screen)
    progress = Progress()
    for name in ("hessfree", "again"):
        train(Task(problem, name, settings, seed=0, budget=Budget(steps=2)), watch=progress.watch)
    progress.close()
    shown = screen.getvalue()
    if not terminal:
        assert shown == ""
        return
    for words in ("hessfree", "again", "100%", "step 2", "loss ", "damping 0.3", "CG 3", " left"):
        assert words in shown
