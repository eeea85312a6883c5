import json
import math
from pathlib import Path

import pytest
import torch

from experiments import data
from experiments.optimizers import AdamSettings, HessianFreeSettings
from experiments.problems import make
from experiments.problems.flow import FlowMatching
from experiments.results import LIGHTNING, quality_table, table, write_json
from experiments.sample_metrics import Quality
from experiments.training import Point, Run, Trial


@pytest.fixture(scope="module")
def problem() -> FlowMatching:
    return FlowMatching.of(data.load("8gaussians"), torch.device("cpu"))


def point(step: int, excess: float, **internals: float) -> Point:
    return Point(step, 10 * step, 0.5 * step, 5 + excess, {"excess_loss": excess, "holdout_loss": 6.0}, internals)


@pytest.fixture
def runs() -> list[Run]:
    hessfree = HessianFreeSettings()
    return [
        Run(
            "hessfree",
            hessfree,
            0,
            2.0,
            (point(0, 8.0), point(6, 0.1, **{"optimizer/damping": 0.3, "optimizer/ratio": math.nan})),
        ),
        Run("adam", AdamSettings(lr=0.03), 0, 2.0, (point(0, 8.0), point(4, 0.4)), (Trial(0.03, 0.5),)),
    ]


def test_json(problem: FlowMatching, runs: list[Run], tmp_path: Path) -> None:
    content = json.loads(write_json(tmp_path / "results.json", problem, runs).read_text())
    assert content["data"] == "8gaussians"
    assert content["environment"]["torch"] == torch.__version__
    assert (content["width"], content["hidden_layers"]) == (64, 3)
    hessfree, adam = content["runs"]
    assert hessfree["optimizer"] == "hessfree"
    assert hessfree["settings"]["curvature_batch"] == 1024
    assert hessfree["seconds"] == [0.0, 3.0] and hessfree["samples"] == [0, 60]
    assert hessfree["train_loss"] == [13.0, 5.1] and hessfree["excess_loss"] == [8.0, 0.1]
    assert hessfree["final"]["excess_loss"] == 0.1 and hessfree["final"]["overshoot_seconds"] == 1.0
    assert adam["settings"]["lr"] == 0.03 and adam["sweep"] == [{"lr": 0.03, "score": 0.5}]
    assert adam["seed"] == 0 and adam["budget_seconds"] == 2.0 and adam["budget_steps"] is None
    by_steps = Run("adam", AdamSettings(lr=0.03), 0, math.inf, (point(0, 8.0), point(4, 0.4)))
    [adam] = json.loads(write_json(tmp_path / "steps.json", problem, [by_steps]).read_text())["runs"]
    assert adam["budget_seconds"] is None and adam["budget_steps"] == 4


def test_numbers_that_json_does_not_have(problem: FlowMatching, tmp_path: Path) -> None:
    run = Run("adam", AdamSettings(lr=9.0), 0, 2.0, (point(0, 8.0), point(4, math.nan), point(5, math.inf)))
    text = write_json(tmp_path / "results.json", problem, [run]).read_text()

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    content = json.loads(text, parse_constant=refuse)
    assert content["runs"][0]["excess_loss"] == [8.0, None, None]
    assert "adam diverged" in table(problem, [run])


def test_table(problem: FlowMatching, runs: list[Run]) -> None:
    lines = table(problem, runs).splitlines()
    assert lines[0].split()[:5] == ["optimizer", "lr", "steps", "samples", "seconds"]
    assert lines[0].endswith("/ adam") and "excess loss" in lines[0]
    assert lines[2].split() == ["hessfree", "1", "6", "60", "3.0", "5.1", "0.1", "0.250"]
    assert lines[3].split() == ["adam", "0.03", "4", "40", "2.0", "5.4", "0.4", "1.000"]
    assert len({len(line) for line in lines[:4]}) == 1
    assert any(f"a perfect network a training loss of {problem.noise_floor:.4g}" in line for line in lines)
    assert any("hessfree: its last step ended 1.0 s after" in line for line in lines)
    assert table(problem, runs[:1]).splitlines()[2].split()[-1] == "-"
    assert "Lightning" in table(problem, runs, LIGHTNING) and "Lightning" not in table(problem, runs)


def test_samples(problem: FlowMatching, runs: list[Run], tmp_path: Path) -> None:
    qualities = {"hessfree": Quality(0.25, 0.5), "data": Quality(0.01, math.nan)}
    lines = quality_table(qualities, "9 by euler").splitlines()
    assert lines[2].split() == ["hessfree", "0.2500", "0.5000"] and "9 by euler" in lines[-2]
    # a diverging path makes all of dopri5's samples NaN, which a bare `nan` would not say
    assert lines[-1].startswith("data has no distance") and "dopri5" in lines[-1]
    assert quality_table({"hessfree": Quality(0.25, 0.5)}, "9 by euler").splitlines()[-1].endswith("9 by euler.")
    content = json.loads(write_json(tmp_path / "results.json", problem, runs, qualities, LIGHTNING).read_text())
    assert content["samples"]["data"] == {"energy_distance": 0.01, "sliced_wasserstein": None}
    assert content["loop"] == "lightning"


def test_a_problem_without_noise(tmp_path: Path) -> None:
    poisson = make("poisson")
    losses = [{"train_objective": value, "relative_error": value / 9} for value in (3.0, 0.5)]
    points = tuple(Point(k, 10 * k, float(k), 2.0, judged) for k, judged in enumerate(losses))
    run = Run("adam", AdamSettings(lr=0.1), 0, 2.0, points)
    content = json.loads(write_json(tmp_path / "results.json", poisson, [run]).read_text())
    assert content["score"] == "train_objective" and "noise_floor" not in content and "width" not in content
    assert content["runs"][0]["train_objective"] == [3.0, 0.5]
    assert content["runs"][0]["final"]["relative_error"] == pytest.approx(0.5 / 9)
    text = table(poisson, [run])
    assert "train objective" in text and "training loss on all rows" in text and "a perfect network" not in text
