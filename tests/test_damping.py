from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hessfree import ConstantDamping, HessianFree, LevenbergMarquardt
from hessfree.memory import reduction_ratio

RULE = LevenbergMarquardt(every=1, omega=0.5, minimum=1e-3, maximum=10.0)


@pytest.mark.parametrize(
    ("damping", "ratio", "rejected", "expected"),
    [
        (1.0, 0.9, False, 0.5),  # the model predicted well
        (1.0, 5.0, False, 0.5),
        (1.0, 0.75, False, 1.0),  # neither: both borders belong to the middle
        (1.0, 0.5, False, 1.0),
        (1.0, 0.25, False, 1.0),
        (1.0, 0.2, False, 2.0),  # it predicted badly
        (1.0, -3.0, False, 2.0),
        (1.0, -math.inf, False, 2.0),
        (1.0, math.nan, False, 1.0),  # not known: no change
        (1.0, math.nan, True, 2.0),  # unless rejected
        (1.0, 0.9, True, 2.0),
        (1.5e-3, 0.9, False, 1e-3),  # the floor
        (1e-3, 0.9, False, 1e-3),
        (8.0, 0.1, False, 10.0),  # the ceiling
        (10.0, 0.1, True, 10.0),
        (50.0, 0.1, False, 50.0),  # given outside: kept until rho moves it inside
        (50.0, 0.9, False, 25.0),
        (1e-5, 0.9, False, 1e-5),
        (1e-5, 0.1, False, 1e-3),
        (0.0, 0.9, False, 0.0),
        (0.0, math.nan, True, 1e-3),  # without a floor no factor could move it
    ],
)
def test_levenberg_marquardt(damping: float, ratio: float, rejected: bool, expected: float) -> None:
    assert RULE.next_damping(damping, ratio, rejected) == pytest.approx(expected, rel=1e-15, abs=0)


@pytest.mark.parametrize("every", [1, 2, 5])
def test_every(every: int) -> None:
    rule = LevenbergMarquardt(every=every, omega=0.9)
    assert [step for step in range(1, 12) if rule.wants_ratio(step)] == list(range(1, 12, every))
    # one change stands for the steps between two, so that the pace does not depend on `every`
    assert rule.next_damping(1.0, 1.0, False) == pytest.approx(0.9**every)
    assert rule.next_damping(1.0, 0.0, False) == pytest.approx(0.9**-every)


def test_constant() -> None:
    rule = ConstantDamping()
    assert not any(rule.wants_ratio(step) for step in range(1, 10))
    assert rule.next_damping(0.3, -1.0, True) == rule.next_damping(0.3, math.nan, False) == 0.3


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"every": 0}, "every=0 must be an integer, 1 or more"),
        ({"every": 1.5}, "every=1.5 must be"),
        ({"omega": 1.0}, "omega=1.0 must lie between 0 and 1"),
        ({"omega": math.nan}, "omega=nan must"),
        ({"low": 0.8}, "low=0.8 must be less than high=0.75"),
        ({"high": math.nan}, "must be less than high=nan"),
        ({"minimum": -1.0}, "minimum=-1.0 and maximum"),
        ({"minimum": 2.0, "maximum": 1.0}, "minimum=2.0 and maximum=1.0 must"),
        ({"maximum": math.inf}, "maximum=inf must satisfy"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        LevenbergMarquardt(**settings)


@pytest.mark.parametrize(
    ("change", "predicted", "expected"),
    [
        (-3.0, -4.0, 0.75),
        (1.0, -4.0, -0.25),
        (0.0, -1e-9, 1.0),  # too small to be seen: nothing speaks against the model
        (-1e-5, -1e-9, 1.0),
        (2e-3, -1e-9, 1 - 2e-3 / 1.1920929e-4),  # a rise that is more than rounding does
        (0.0, 0.0, 1.0),
        (0.0, 1e-9, 1.0),
    ],
)
def test_the_ratio_of_changes(change: float, predicted: float, expected: float) -> None:
    assert reduction_ratio(change, predicted, 100.0, torch.float32) == pytest.approx(expected, rel=0.1)


def test_no_ratio_of_nothing() -> None:
    assert math.isnan(reduction_ratio(math.nan, -1.0, 100.0, torch.float32))
    assert math.isnan(reduction_ratio(math.nan, -1e-9, 100.0, torch.float32))
    assert math.isnan(reduction_ratio(0.0, 0.0, 0.0, torch.float32))


@pytest.mark.parametrize("test", ["replay", "next_loss"])
def test_a_damping_far_too_high_comes_down_where_its_steps_cannot_be_seen(test: str) -> None:
    """A loss of 250 with a valley 0.05 deep, as an autoencoder's near its end, and a λ that hides every step."""
    model = nn.Linear(2, 1, bias=False)
    model.weight = nn.Parameter(torch.tensor([[0.3, -0.1]]))
    optimizer = HessianFree(
        model.parameters(), damping=1e4, damping_rule=LevenbergMarquardt(every=1, omega=0.5, test=test)
    )
    x = torch.eye(2)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = 250 + model(x).square().mean()
        loss.backward()
        return loss

    for _ in range(40):
        optimizer.step(closure)
    assert optimizer.param_groups[0]["damping"] < 1.0
    assert float(model.weight.detach().norm()) < 1e-3
