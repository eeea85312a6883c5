import json
import math
from pathlib import Path
from typing import Any

import pytest

from experiments.benchmark.store import check_settings, crossing, load, merge, save
from experiments.environment import UsageError
from tests.experiments.benchmark.rows import row

HERE: dict[str, Any] = {"device": "cpu", "threads": 2}


def curve(*scores: float | None) -> dict[str, list[Any]]:
    return {"seconds": [float(k) for k in range(len(scores))], "score": list(scores)}


def test_a_crossing_is_interpolated_on_the_logarithm() -> None:
    assert crossing(curve(100.0, 10.0, 1.0, 0.1), math.sqrt(10)) == pytest.approx(1.5)
    assert crossing(curve(100.0, 10.0, 1.0, 0.1), 10.0) == pytest.approx(1.0)
    assert crossing(curve(100.0, 10.0, 1.0, 0.1), 0.1) == pytest.approx(3.0)


def test_a_dip_is_no_crossing() -> None:
    assert crossing(curve(8.0, 1.0, 8.0, 2.0, 1.0), 4.0) == pytest.approx(2.5)
    assert crossing(curve(8.0, 1.0, 0.5, 8.0), 4.0) is None
    assert crossing(curve(8.0, 1.0, None, 2.0), 4.0) == 3.0  # what is not finite is above, and has no logarithm
    assert crossing(curve(8.0, 1.0, None), 4.0) is None


def test_crossings_at_the_ends() -> None:
    assert crossing(curve(1.0, 0.5), 2.0) == 0.0
    assert crossing(curve(8.0, 5.0), 4.0) is None
    assert crossing(curve(), 4.0) is None
    assert crossing(curve(8.0, 5.0), None) is None
    assert crossing(curve(8.0, -1.0), 4.0) == 1.0  # no logarithm


def test_marks_are_of_the_same_problem_and_seed() -> None:
    rows = merge(
        [],
        [
            row("a", "adam", 0, [8.0, 4.0]),
            row("a", "adam", 1, [8.0, 1.0]),
            row("a", "hessfree", 0, [8.0, 2.0, 1.0]),
            row("a", "hessfree", 1, [8.0, 2.0, 1.5]),
            row("a", "hessfree", 2, [8.0, 2.0]),
            row("b", "hessfree", 0, [8.0, 2.0]),
        ],
    )
    assert [one["seconds_to_adam_final"] for one in rows] == [2.0, 2.0, pytest.approx(1.5), None, None, None]


def test_later_runs_replace_their_like_and_move_the_mark() -> None:
    rows = merge([], [row("a", "adam", 0, [8.0, 4.0]), row("a", "hessfree", 0, [8.0, 2.0])])
    again = merge(rows, [row("a", "adam", 0, [8.0, 2.0]), row("b", "adam", 0, [1.0])])
    assert [(one["problem"], one["optimizer"]) for one in again] == [("a", "adam"), ("a", "hessfree"), ("b", "adam")]
    assert again[0]["final"] == 2.0
    assert again[1]["seconds_to_adam_final"] == pytest.approx(2.0)
    assert rows[1]["seconds_to_adam_final"] == pytest.approx(1.5)  # what was given stays as it was
    gone = merge(again, [row("a", "adam", 0, [8.0, None])])
    assert [one["seconds_to_adam_final"] for one in gone] == [None, None, 1.0]


def test_several_sittings(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    assert load(path, HERE, {}) == []
    rows = merge([], [row("a", "adam", 0, [8.0, None])])
    save(path, HERE, rows)
    assert load(path, HERE, {}) == rows
    assert json.loads(path.read_text())["environment"] == HERE
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"]


def test_seconds_of_another_machine_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    save(path, HERE, [])
    with pytest.raises(UsageError, match="with threads 2, and this is 1: .*--fresh"):
        load(path, HERE | {"threads": 1}, {})
    path.write_text('{"environment": {}}')
    with pytest.raises(UsageError, match="holds no results.*rows.*--fresh"):
        load(path, HERE, {})
    path.write_text("[")
    with pytest.raises(UsageError, match="holds no results"):
        load(path, HERE, {})


def test_runs_of_another_budget_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    save(path, HERE, merge([], [row("a", "adam", 0, [8.0, 4.0])]))
    assert len(load(path, HERE, {"a": 2.0, "b": 7.0})) == 1
    with pytest.raises(UsageError, match="runs of 2 s of a, and 12 s are asked for.*--fresh"):
        load(path, HERE, {"a": 12.0})


def test_runs_with_other_settings_do_not_stay_beside_new_ones(tmp_path: Path) -> None:
    old = [row("a", "adam", seed, [8.0, 4.0], settings={"lr": 0.1}) for seed in (0, 1)] + [row("a", "sgd", 0, [8.0])]
    new = [row("a", "adam", seed, [8.0, 4.0], settings={"lr": 0.3}) for seed in (0, 1)]
    path = tmp_path / "results.json"
    check_settings(path, old, new)  # both seeds are replaced
    check_settings(path, old, [row("a", "adam", 2, [8.0], settings={"lr": 0.1}), row("b", "adam", 0, [8.0])])
    with pytest.raises(UsageError, match="adam on a, seed 1, with .*0.1.*now .*0.3.*--seeds.*--fresh"):
        check_settings(path, old, new[:1])
