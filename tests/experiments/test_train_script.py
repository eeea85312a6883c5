"""The command line, run inside this process with budgets of milliseconds."""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.experiments.scripts import SCRIPTS, main_of

SCRIPT = SCRIPTS / "train.py"
TINY = ["--budget-seconds", "0.001"]
SMALL = ["hessfree.batch_size=16", "dense-fisher.batch_size=4", "adam.batch_size=16"]

Main = Callable[[list[str]], int]


@pytest.fixture(scope="module")
def main() -> Main:
    return main_of("train")


def test_the_default_job(main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TINY, "--width", "16", "--out", str(tmp_path), "--set", *SMALL]) == 0
    output = capsys.readouterr().out
    assert "learning rates on seed 1000: 0.001:" in output
    assert output.rstrip().endswith(f"tensorboard --logdir {tmp_path / 'tensorboard'}")
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["data"] == "8gaussians-w16"
    assert [run["optimizer"] for run in content["runs"]] == ["hessfree", "dense-fisher", "adam"]
    for run in content["runs"]:
        lengths = {len(run[name]) for name in ("seconds", "samples", "train_loss", "excess_loss")}
        assert len(lengths) == 1 and lengths.pop() >= 2
        assert run["settings"]["lr"] > 0 and run["final"]["seconds"] == run["seconds"][-1]
        assert list((tmp_path / "tensorboard" / run["optimizer"]).glob("events.out.tfevents.*"))
    assert len(content["runs"][2]["sweep"]) == 4
    for name in ("curves.png", "samples.png"):
        assert str(tmp_path / name) in output and (tmp_path / name).stat().st_size > 10_000
    assert "sliced Wasserstein" in output and set(content["samples"]) > {"hessfree", "dense-fisher", "adam"}


def test_digits_by_held_out_loss(main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "not" / "yet"
    settings = ["--set", "adam.lr=0.01", "--set", "adam.batch_size=8"]
    arguments = ["--data", "digits", "--optimizers", "adam", "--seed", "1", "--device", "cpu", "--out", str(out)]
    assert main([*TINY, *arguments, *settings]) == 0
    output = capsys.readouterr().out
    assert "held-out loss" in output and "learning rates" not in output
    content = json.loads((out / "results.json").read_text())
    assert content["dim"] == 64 and content["score"] == "holdout_loss"
    common = {"warmup": 0.0, "final_length": 0.0}
    assert content["runs"][0]["settings"] == common | {"lr": 0.01, "batch_size": 8, "weight_decay": 0.0}
    assert content["runs"][0]["seed"] == 1


def test_default_place_and_digits_784(main: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*TINY, "--data", "digits", "--dim", "784", "--optimizers", "adam", "--set", "adam.lr=0.01"]) == 0
    content = json.loads((tmp_path / "runs" / "digits-784" / "results.json").read_text())
    assert content["dim"] == 784


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data", "spirals"], ["'spirals'", "8gaussians, moons, checkerboard, digits"]),
        (["--dim", "64"], ["--dim 64", "8gaussians"]),
        (["--optimizers", "sundial"], ["'sundial'", "hessfree, dense-fisher, "]),
        (["--budget-seconds", "-1"], ["-1", "positive"]),
        (["--budget-seconds", "nan"], ["nan", "positive"]),
        (["--budget-seconds", "inf"], ["inf", "positive"]),
        (["--seed", "-3"], ["-3", "0 to"]),
        (["--device", "abacus"], ["'abacus'", "cpu"]),
        (["--set", "hessfree.colour=1"], ["'colour'", "damping"]),
        (["--set", "hessfree.curvature_batch=9000"], ["9000", "8192"]),
        (["--data", "digits-784", "--optimizers", "dense-fisher"], ["109584", "leave it out"]),
        (
            ["--set", "hessfree.damping=0.5", "hessfree.omega=1"],
            ["'hessfree.omega=1'", "between 0 and 1", "out for 0.8"],
        ),
        (["--optimizers", "kfac", "--set", "kfac.gradient_ema=1"], ["'kfac.gradient_ema=1'", "decay", "out for 0.9"]),
        (["--budget-steps", "0"], ["--budget-steps 0", "positive"]),
        (["--target", "blue"], ["'blue'", "raw, stable, fixed"]),
        (["--target", "stable", "--coupling", "ot"], ["--coupling ot", "--target raw"]),
        (["--target", "fixed", "--sigma", "1"], ["--target fixed", "--target raw"]),
        (["--sigma", "-1"], ["--sigma -1", "positive"]),
        (["--width", "0"], ["--width 0", "positive"]),
        (["--sampler", "leap"], ["'leap'", "euler, midpoint"]),
        (["--sampler-steps", "0"], ["--sampler-steps 0", "positive"]),
        (["--data", "mnist", "--data-root", "/no/such/place"], ["/no/such/place", "digits-784"]),
        (["--data", "mnist", "--data-root", "/no/such/place", "--optimizers", "hesfree"], ["'hesfree'", "choose from"]),
        (["--data", "mnist", "--data-root", "/no/such/place", "--set", "hesfree.lr=1"], ["'hesfree'", "choose from"]),
        (["--resume"], ["checkpoint.pt", "leave --resume out"]),
        (["--config", "/no/such.toml"], ["/no/such.toml", "cannot be read"]),
    ],
)
def test_input_that_makes_no_sense(
    main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: list[str]
) -> None:
    budget = [] if "--budget-steps" in arguments else TINY
    assert main([*budget, "--out", str(tmp_path / "out"), *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and captured.err.startswith("train.py: error: ")
    assert all(word in captured.err for word in words), captured.err
    assert captured.out == ""
    assert not list(tmp_path.rglob("events.out.*")) and not list(tmp_path.rglob("*.pt"))


@pytest.mark.parametrize("below", [".", "deeper/still"])
def test_out_is_a_file(main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str], below: str) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    assert main([*TINY, "--out", str(file / below)]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and "cannot be written" in captured.err
    assert captured.out == "" and file.read_text() == "mine"


@pytest.mark.parametrize(
    "arguments",
    [
        ["--seed", "one"],
        ["--unknown"],
        ["--optimizers"],
        ["--budget", "3"],
        ["--budget-seconds", "1", "--budget-steps", "2"],
        ["--out", "~nobody-of-this-name/runs"],
    ],
)
def test_words_that_cannot_be_parsed(main: Main, capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    captured = capsys.readouterr()
    assert exit_.value.code == 2 and captured.err.count("\n") == 1


def test_missing_extra(main: Main, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else object())
    assert main(TINY) == 2
    assert 'matplotlib; run: pip install -e ".[experiments]"' in capsys.readouterr().err


def test_package_not_installed(tmp_path: Path) -> None:
    # Isolated mode with a copied script: neither this clone nor its packages are on the path.
    script = tmp_path / "train.py"
    script.write_text(SCRIPT.read_text())
    done = subprocess.run(
        [sys.executable, "-I", "-S", str(script), "--help"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert 'pip install -e ".[experiments]"' in done.stderr
