from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from experiments.benchmark import tuning
from experiments.benchmark.measure import Row, Work
from experiments.environment import UsageError
from experiments.optimizers import AdamSettings
from experiments.problems import Problem, make


@pytest.fixture(scope="module")
def problem() -> Problem:
    return make("moons")


def answer(monkeypatch: pytest.MonkeyPatch, score: Any) -> list[Work]:
    """Let runs end where a function of their settings says."""
    seen: list[Work] = []

    def perform_all(works: Sequence[Work], jobs: int) -> Iterator[Row]:
        seen.extend(works)
        return ({"final": score(work.settings), "steps": 7} for work in works)

    monkeypatch.setattr(tuning, "perform_all", perform_all)
    return seen


def test_the_best_is_chosen_and_all_are_recorded(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    works = answer(monkeypatch, lambda one: None if one.lr > 0.05 else abs(one.lr - 0.003) + one.batch_size / 1e6)
    lines: list[str] = []
    record = tuning.tune(problem, ["adam"], budget_seconds=12.0, threads=2, jobs=2, say=lines.append)
    one = record["adam"]
    assert one["chosen"] == {"lr": 3e-3, "batch_size": 1024}
    assert len(one["trials"]) == 8 == len(works)
    assert [trial["score"] for trial in one["trials"] if trial["changes"]["lr"] == 0.1] == [None, None]
    assert {(work.seed, work.budget_seconds, work.threads) for work in works} == {(1000, 0.4 * 12, 1)}
    assert one["seed"] == 1000 and one["budget_seconds"] == 0.4 * 12
    assert "adam with lr 0.1, batch_size 4096: diverged" in "\n".join(lines)
    assert lines[-1] == "moons: adam takes lr 0.003, batch_size 1024 (at the edge of its grid: lr)"
    assert one["at_edge"] == ["lr"]  # two batches were tried: both are edges, and say nothing
    assert tuning.at_edge({"lr": 2, "n": 9}, [{"lr": lr, "n": n} for lr in (1, 2, 3) for n in (5, 7, 9)]) == ["n"]


def test_nothing_is_chosen_where_all_diverged(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, lambda one: None)
    with pytest.raises(UsageError, match="soap diverged on moons with all of its grid"):
        tuning.tune(problem, ["soap"], budget_seconds=1.0, threads=1, jobs=1, say=lambda line: None)


def test_settings_from_the_record(problem: Problem, tmp_path: Path) -> None:
    path = tmp_path / "tuned.json"
    assert tuning.load(path) == {}
    tuning.save(path, {"moons": {"adam": {"chosen": {"lr": 0.02, "batch_size": 64}}}})
    tuned = tuning.load(path)
    assert tuning.settings_of("adam", problem, tuned) == AdamSettings(lr=0.02, batch_size=64)
    with pytest.raises(UsageError, match="soap has not been tuned on moons.*--tune --problems moons --optimizers soap"):
        tuning.settings_of("soap", problem, tuned)
    guess: Any = tuning.settings_of("soap", problem, tuned, untuned=True)
    assert guess.lr == 0.03
    tuned["moons"]["adam"]["chosen"] = {"colour": 1}
    with pytest.raises(UsageError, match="does not fit .*colour.*--tune"):
        tuning.settings_of("adam", problem, tuned)


@pytest.mark.parametrize("text", ["[", "[]", '{"moons": {"adam": {}}}', '{"moons": {"adam": {"chosen": 1}}}'])
def test_a_record_of_something_else(tmp_path: Path, text: str) -> None:
    path = tmp_path / "tuned.json"
    path.write_text(text)
    with pytest.raises(UsageError, match="holds no tuned settings.*--tune"):
        tuning.load(path)


def test_the_published_record_fits_the_suite() -> None:
    for name, contenders in tuning.load().items():
        problem = make(name)
        for contender in contenders:
            tuning.settings_of(contender, problem, {name: contenders})


def test_rivals_that_were_tuned_with_less_are_named() -> None:
    def tuned(trials: int, seconds: float, threads: int) -> dict[str, Any]:
        return {"trials": [{}] * trials, "budget_seconds": seconds, "threads": threads}

    record = {"a": {"ours": tuned(4, 2.0, 2), "level": tuned(8, 2.0, 2), "less": tuned(3, 1.0, 1)}}
    assert tuning.handicaps(record, "a", ["ours", "level", "less", "unknown"], "ours") == [
        "a: less was tuned with 3 trials, ours with 4",
        "a: less was tuned with 1 seconds a trial, ours with 2",
        "a: less was tuned with 1 threads, ours with 2",
    ]
    assert tuning.handicaps(record, "a", ["less"], "ours") == tuning.handicaps(record, "b", ["less"], "ours") == []
