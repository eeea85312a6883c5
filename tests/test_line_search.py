from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from hessfree import Armijo, FullStep
from hessfree.line_search import Found


class Losses:
    """The loss as a function of the step length, and every length it was asked for."""

    def __init__(self, function: Callable[[float], float]) -> None:
        self.asked: list[float] = []
        self._function = function

    def __call__(self, alpha: float) -> float:
        self.asked.append(alpha)
        return self._function(alpha)


def test_a_full_step_is_taken_unseen_unless_rho_is_wanted() -> None:
    losses = Losses(lambda _: 1e9)
    found = FullStep().search(losses, 1.0, -1.0, wanted=False)
    assert found.accepted and found.step_length == 1 and math.isnan(found.loss) and losses.asked == []


@pytest.mark.parametrize(
    ("after", "accepted", "why"),
    [
        (1.5, True, "accepted"),
        (2.0, True, "accepted"),
        (2.0 + 1e-6, True, "accepted"),  # float32 rounding of a loss of 2
        (2.0 + 1e-5, False, "rejected: the loss rose from 2 to 2"),
        (3.25, False, "rejected: the loss rose from 2 to 3.25"),
        (math.nan, False, "rejected: the loss became nan"),
        (math.inf, False, "rejected: the loss became inf"),
        (-math.inf, False, "rejected: the loss became -inf"),
    ],
)
def test_a_full_step_whose_loss_is_known(after: float, accepted: bool, why: str) -> None:
    losses = Losses(lambda _: after)
    found = FullStep().search(losses, 2.0, -1.0, wanted=True)
    assert (found.accepted, found.why, found.step_length, losses.asked) == (accepted, why, 1.0, [1.0])
    assert found.loss == after or math.isnan(after)


def test_a_negative_loss_has_rounding_too() -> None:
    assert FullStep().search(lambda _: -2.0 + 1e-6, -2.0, -1.0, wanted=True).accepted
    assert not FullStep().search(lambda _: -1.9, -2.0, -1.0, wanted=True).accepted


def test_armijo_by_hand() -> None:
    # L(a) = (1 - 4a)^2 has slope -8. With c = 1/2 it asks for L(a) <= 1 - 4a:
    # L(1) = 9 > -3, L(1/2) = 1 > -1, L(1/4) = 0 <= 0
    losses = Losses(lambda a: (1 - 4 * a) ** 2)
    found = Armijo(decrease=0.5).search(losses, 1.0, -8.0, wanted=False)
    assert found == Found(0.25, 0.0, True, "accepted") and losses.asked == [1.0, 0.5, 0.25]
    # with c = 0.6 it asks for 1 - 4.8a: L(1/4) = 0 > -0.2, L(1/8) = 0.25 <= 0.4
    found = Armijo(decrease=0.6).search(losses, 1.0, -8.0, wanted=False)
    assert (found.step_length, found.loss, found.accepted) == (0.125, 0.25, True)
    found = Armijo(decrease=0.6, shrink=0.1).search(losses, 1.0, -8.0, wanted=True)
    assert found.step_length == pytest.approx(0.1) and found.loss == pytest.approx(0.36)


def test_armijo_gives_up() -> None:
    losses = Losses(lambda a: 1 + a)
    found = Armijo(max_trials=4).search(losses, 1.0, -1.0, wanted=False)
    assert not found.accepted and losses.asked == [1.0, 0.5, 0.25, 0.125]
    assert found.step_length == 0.125 and found.loss == 1.125
    assert found.why == "rejected: the loss fell too little at any of 4 step lengths down to 0.12"


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_armijo_steps_back_from_losses_that_are_not_finite(bad: float) -> None:
    found = Armijo().search(lambda a: bad if a > 0.3 else 1 - a, 1.0, -1.0, wanted=False)
    assert (found.step_length, found.loss, found.accepted) == (0.25, 0.75, True)
    assert not Armijo().search(lambda a: bad, 1.0, -1.0, wanted=False).accepted


def test_armijo_along_a_direction_that_climbs_asks_for_no_rise() -> None:
    assert Armijo().search(lambda a: 1.0, 1.0, 5.0, wanted=False).accepted
    assert not Armijo().search(lambda a: 1.0 + a, 1.0, 5.0, wanted=False).accepted


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"decrease": 0.0}, "decrease=0.0 must lie between 0 and 1"),
        ({"decrease": math.nan}, "decrease=nan must"),
        ({"shrink": 1.0}, "shrink=1.0 must lie between 0 and 1"),
        ({"max_trials": 0}, "max_trials=0 must be an integer, 1 or more"),
        ({"max_trials": 2.0}, "max_trials=2.0 must be"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Armijo(**settings)
