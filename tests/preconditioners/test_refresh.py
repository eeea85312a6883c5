"""When preconditioners learn, and the settings that they share."""

from __future__ import annotations

import math
from typing import Any

import pytest

from hessfree.preconditioners import KFAC, EmpiricalFisherDiagonal, Jacobi, Nystrom, Woodbury

ALL = [KFAC, EmpiricalFisherDiagonal, Jacobi, Nystrom, Woodbury]


def updates(preconditioner: Any, steps: int) -> list[int]:
    state, made = {}, []
    for step in range(1, steps + 1):
        if preconditioner.due(state, step):
            made.append(step)
            state = {"updates": len(made), "step": step}
    return made


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"update_every": 4, "warmup_updates": 3}, [1, 2, 3, 7, 11, 15]),
        ({"update_every": 4, "warmup_updates": 0}, [1, 5, 9, 13]),
        ({"update_every": 1, "warmup_updates": 0}, list(range(1, 16))),
        ({"update_every": 20, "warmup_updates": 5}, [1, 2, 3, 4, 5]),
    ],
)
def test_every_step_at_first_and_then_every_nth(kind: Any, settings: dict[str, int], expected: list[int]) -> None:
    assert updates(kind(**settings), 15) == expected


def test_the_defaults() -> None:
    assert updates(KFAC(), 14) == updates(Jacobi(), 14) == [1, 2, 3, 8, 13]
    assert updates(Woodbury(), 24) == [1, 2, 3, 13, 23]
    assert updates(Nystrom(), 42) == [1, 21, 41]
    assert EmpiricalFisherDiagonal().power == 0.75 and Jacobi().power == KFAC().power == 1
    assert Jacobi().damping_scale == 1 and KFAC().damping_scale == 0.1


WRONG: list[tuple[str, Any, str]] = [
    ("update_every", 0, "update_every=0 must be an integer, 1 or more"),
    ("update_every", True, "update_every=True must be an integer"),
    ("warmup_updates", -1, "warmup_updates=-1 must be an integer, 0 or more"),
    ("warmup_updates", 2.0, "warmup_updates=2.0 must be"),
    ("decay", -0.1, "decay=-0.1 must satisfy"),
    ("damping_scale", math.nan, "damping_scale=nan must be positive and finite"),
    ("power", 1.5, "power=1.5 must satisfy 0 < power <= 1"),
]


@pytest.mark.parametrize(
    ("kind", "name", "value", "words"),
    [(kind, *wrong) for kind in ALL for wrong in WRONG if wrong[0] in kind.__dataclass_fields__],
)
def test_settings_out_of_range(kind: Any, name: str, value: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        kind(**{name: value})
