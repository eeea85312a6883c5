import math
from pathlib import Path

import pytest
import torch

from experiments import data
from experiments.optimizers import AdamSettings
from experiments.plots import title_of, write_curves
from experiments.problems.flow import FlowMatching
from experiments.training import Point, Run

SIGNATURE = b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize("name", ["8gaussians", "digits"])
@pytest.mark.parametrize("ends", [[0.1, 0.1, 0.4], [0.01, math.nan, math.inf], [math.nan] * 3])
def test_curves(name: str, ends: list[float], tmp_path: Path) -> None:
    problem = FlowMatching.of(data.load(name), torch.device("cpu"))

    def run(optimizer: str, end: float) -> Run:
        losses = [1.3, end * 1.1, end]
        points = tuple(Point(k, 64 * k, 0.5 * k, x, {problem.score: x}) for k, x in enumerate(losses))
        return Run(optimizer, AdamSettings(lr=0.1), 0, 1.0, points)

    runs = [run(optimizer, end) for optimizer, end in zip(["hessfree", "adam", "another"], ends, strict=True)]
    path = write_curves(tmp_path / "curves.png", problem, runs)
    assert path.read_bytes().startswith(SIGNATURE)


@pytest.mark.parametrize(("seconds", "equal"), [(2.0, "equal seconds of training"), (math.inf, "equal steps")])
def test_the_title_says_what_was_equal(seconds: float, equal: str) -> None:
    problem = FlowMatching.of(data.load("8gaussians"), torch.device("cpu"))
    points = tuple(Point(k, 64 * k, 0.5 * k, 1.0, {problem.score: 1.0}) for k in range(2))
    run = Run("adam", AdamSettings(lr=0.1), 0, seconds, points)
    assert title_of(problem, [run]) == f"8gaussians: excess loss at {equal}"
