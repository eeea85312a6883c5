from __future__ import annotations

import math
from typing import Any

import pytest

from hessfree import ConstantDamping, LevenbergMarquardt

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
