import dataclasses
import math
from typing import Any

import pytest

from experiments.benchmark import averaging
from experiments.benchmark.averaging import FloorJob, run
from experiments.environment import UsageError
from experiments.problems import make


def test_no_average_goes_below_the_floor(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    problem: Any = make("8gaussians")
    monkeypatch.setattr(averaging, "make", lambda name: dataclasses.replace(problem, width=16))
    [one] = run(FloorJob(steps=300, shares=(0.5,), threads=1))
    assert one["samples"] == 300 * 1024
    assert 0 < one["floor"] < one["without_prior"] and one["floor"] < one["averaged"]
    assert all(math.isfinite(value) for value in one.values())
    assert capsys.readouterr().out.count("\n") == 3


def test_what_has_no_floor() -> None:
    with pytest.raises(UsageError, match="'8gaussians-fixed' has no known floor"):
        run(FloorJob(problems=["8gaussians-fixed"]))
    with pytest.raises(UsageError, match="--steps 1"):
        run(FloorJob(steps=1))
