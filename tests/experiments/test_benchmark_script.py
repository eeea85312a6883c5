"""The command line of the benchmark, with budgets of milliseconds."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.experiments.scripts import main_of

TINY = ["--quick", "--budget-seconds", "0.001", "--threads", "1"]
INSIDE = [*TINY, "--jobs", "0", "--seeds", "0"]

Main = Callable[[list[str]], int]


@pytest.fixture(scope="module")
def main() -> Main:
    return main_of("benchmark")


def test_tune_then_run_then_run_more(main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    only = ["optimizers", *INSIDE, "--out", str(tmp_path), "--problems", "moons", "--optimizers"]
    assert main([*only, "adam", "--tune"]) == 0
    tuned = json.loads((tmp_path / "tuned.json").read_text())
    assert len(tuned["moons"]["adam"]["trials"]) == 2 and not (tmp_path / "results.json").exists()
    settings = ["--tuned", str(tmp_path / "tuned.json")]
    assert main([*only, "adam", "soap", *settings]) == 0
    assert main([*only, "hessfree", *settings]) == 0
    output = capsys.readouterr().out
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["environment"]["threads"] == 1
    assert [(row["problem"], row["optimizer"], row["seed"]) for row in content["rows"]] == [
        ("moons", "adam", 0),
        ("moons", "soap", 0),
        ("moons", "hessfree", 0),
    ]
    adam = content["rows"][0]
    chosen = tuned["moons"]["adam"]["chosen"]
    assert {name: adam["settings"][name] for name in chosen} == chosen
    assert adam["seconds_to_adam_final"] == pytest.approx(adam["seconds"])
    assert all(len(adam["curve"][name]) == 2 for name in ("seconds", "score", "samples"))
    assert adam["final"] == adam["losses"]["excess_loss"] == adam["curve"]["score"][-1]
    assert adam["steps"] == 1 and adam["samples"] == chosen["batch_size"]
    assert (tmp_path / "table.md").read_text().count("\n") == 5 + 1 + 3  # all contenders, and the overview
    for name in ("curves-moons.png", "summary.png"):
        assert str(tmp_path / name) in output and (tmp_path / name).stat().st_size > 5_000


def test_who_was_not_tuned_is_left_out_and_said_so(
    main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tuned = tmp_path / "tuned.json"
    tuned.write_text(json.dumps({"moons": {"adam": {"chosen": {"lr": 0.01, "batch_size": 64}}}}))
    arguments = ["optimizers", *(word for word in INSIDE if word != "--quick"), "--tuned", str(tuned)]
    assert main([*arguments, "--out", str(tmp_path), "--problems", "moons"]) == 0
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [row["optimizer"] for row in rows] == ["adam"]
    assert "moons: without hessfree, soap, which nobody tuned there" in capsys.readouterr().out


def test_fresh_leaves_out_what_was(main: Main, tmp_path: Path) -> None:
    arguments = ["optimizers", *INSIDE, "--out", str(tmp_path), "--optimizers", "adam", "--problems"]
    assert main([*arguments, "moons"]) == 0
    assert main([*arguments, "8gaussians", "--fresh"]) == 0
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [row["problem"] for row in rows] == ["8gaussians"]


def test_who_was_stopped_goes_on(main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["optimizers", *TINY, "--jobs", "0", "--out", str(tmp_path), "--problems", "conv", "--seeds", "0"]
    assert main([*arguments, "--optimizers", "adam"]) == 0
    path = tmp_path / "results.json"
    first = json.loads(path.read_text())["rows"][0]
    capsys.readouterr()
    assert main([*arguments, "--optimizers", "adam", "sgd"]) == 0
    output = capsys.readouterr().out
    assert "1 runs of an earlier sitting stay as they are" in output and "conv: adam, seed 0" not in output
    rows = json.loads(path.read_text())["rows"]
    assert rows[0] == first and [row["optimizer"] for row in rows] == ["adam", "sgd"]


def test_a_run_in_a_process_of_its_own(main: Main, tmp_path: Path) -> None:
    arguments = ["--problems", "moons", "--optimizers", "hessfree", "--seeds", "1", "--out", str(tmp_path)]
    assert main(["optimizers", *TINY, *arguments]) == 0
    [row] = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert row["seed"] == 1 and row["steps"] == 1 and row["final"] > 0
    assert row["seconds_to_adam_final"] is None


def test_ablation(main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--problems", "moons", "--variations", "K-FAC, CG 1", "--out", str(tmp_path)]
    assert main(["ablation", *INSIDE, *arguments]) == 0
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [row["optimizer"] for row in rows] == ["default", "K-FAC, CG 1"]
    assert "max_iterations=1" in rows[1]["settings"]["recipe"]
    assert " at 0x" not in rows[1]["settings"]["recipe"]  # an address would make each sitting start over
    assert (tmp_path / "table.md").read_text().startswith("| variation | moons | over default's |")
    capsys.readouterr()
    assert main(["ablation", *INSIDE, *arguments]) == 0
    assert "2 runs of an earlier sitting stay as they are" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["optimizers", "--problems", "spirals"], ["'spirals'", "8gaussians-fixed"]),
        (["optimizers", "--problems", "all", "digits"], ["all digits", "alone"]),
        (["optimizers", "--optimizers", "luck"], ["'luck'", "hessfree, kfac, adam"]),
        (["optimizers", "--problems", "moons", "--optimizers", "lbfgs"], ["lbfgs", "none of these problems"]),
        (["optimizers", "--threads", "0"], ["--threads 0", "1 or more"]),
        (["optimizers", "--jobs", "-1"], ["--jobs -1"]),
        (["optimizers", "--seeds", "1000"], ["1000", "tuning"]),
        (["optimizers", "--seeds", "-1"], ["-1", "0 to"]),
        (["optimizers", "--seeds", "1", "1"], ["twice"]),
        (["optimizers", "--budget-seconds", "0"], ["--budget-seconds 0", "positive"]),
        (["optimizers", "--device", "abacus"], ["'abacus'", "cpu"]),
        (["ablation", "--variations", "magic"], ["'magic'", "K-FAC, CG 1"]),
        (["ablation", "--problems", "spirals"], ["'spirals'", "digits"]),
    ],
)
def test_input_that_makes_no_sense(
    main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: list[str]
) -> None:
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and captured.err.startswith("benchmark.py: error: ")
    assert all(word in captured.err for word in words), captured.err
    assert captured.out == "" and not (tmp_path / "out").exists()


def test_rivals_are_not_run_untuned(main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nothing = tmp_path / "none.json"
    arguments = ["--problems", "moons", "--out", str(tmp_path), "--tuned", str(nothing)]
    assert main(["optimizers", *arguments]) == 2
    assert "is no file" in capsys.readouterr().err
    nothing.write_text("{}")
    assert main(["optimizers", *arguments]) == 2
    assert "hessfree has not been tuned on moons" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["race"], ["optimizers", "--seeds", "one"], ["ablation", "--tune"]])
def test_words_that_cannot_be_parsed(main: Main, capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    captured = capsys.readouterr()
    assert exit_.value.code == 2 and captured.err.count("\n") == 1
    assert captured.err.startswith("benchmark.py: error: ")


def test_the_home_of_a_path(
    main: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main(["optimizers", "--tuned=~/none.json"]) == 2
    assert str(tmp_path / "none.json") in capsys.readouterr().err
