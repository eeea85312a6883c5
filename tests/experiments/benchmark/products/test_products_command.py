"""`scripts/benchmark.py products`, on the smallest model."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from experiments.benchmark.products.implementations import IMPLEMENTATIONS, Product
from experiments.environment import UsageError
from tests.experiments.scripts import main_of

Main = Callable[[list[str]], int]
NAMED = ["--models", "toy2", "--implementations", "BackPACK", "layer-wise by hand", "one gradient"]


@pytest.fixture(scope="module")
def main() -> Main:
    return main_of("benchmark")


@pytest.fixture(autouse=True)
def same_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NPROC", "KINETO_LOG_LEVEL"):
        monkeypatch.setenv(name, os.environ.get(name, ""))  # put back afterwards


def test_writes_what_it_prints(
    main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(IMPLEMENTATIONS["BackPACK"], "package", "a_package_that_nobody_wrote")
    threads = torch.get_num_threads()
    assert main(["products", "--quick", "--threads", "1", "--out", str(tmp_path), *NAMED]) == 0
    assert torch.get_num_threads() == threads
    output = capsys.readouterr().out
    content = json.loads((tmp_path / "results.json").read_text())
    assert set(content) == {"environment", "models", "rows", "missing", "step", "bars"}
    assert content["environment"]["threads"] == 1 and content["environment"]["quick"] is True
    names = [row["implementation"] for row in content["rows"]]
    assert names == ["hessfree", "layer-wise by hand", "one gradient"]
    for row in content["rows"]:
        assert row["model"] == "toy2" and row["median_ms"] > 0 and row["ratio_to_ours"] > 0 and row["error"] <= 1e-5
        assert row["peak_ratio"] > 0 and row["setup_ms"] >= 0 and set(row["totals_ms"]) == {"1", "3", "10", "50"}
    reason = "absent: pip install backpack-for-pytorch"
    assert content["missing"] == [{"model": "toy2", "implementation": "BackPACK", "reason": reason}]
    assert reason in output and "ToyMLP 2, w 64, N 32" in output
    assert "set-up of a step / gradient" in output and {bar["model"] for bar in content["bars"]} >= {"toy2"}
    assert (tmp_path / "table.md").read_text().strip() in output
    assert (tmp_path / "products.png").stat().st_size > 5_000 and str(tmp_path / "products.png") in output


def test_a_model_that_cannot_be_had_is_listed(
    main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from experiments.benchmark.products import workloads

    make = workloads.make

    def without(name: str, *others: object) -> object:
        if name == "resnet18":
            raise UsageError("resnet18 needs torchvision")
        return make(name, *others)

    monkeypatch.setattr(workloads, "make", without)
    monkeypatch.setattr(workloads, "NAMES", ("toy2", "resnet18"))
    arguments = ["--quick", "--threads", "1", "--out", str(tmp_path), "--implementations", "one gradient"]
    assert main(["products", *arguments]) == 0
    content = json.loads((tmp_path / "results.json").read_text())
    assert [one["model"] for one in content["missing"]] == ["resnet18", "resnet18"]
    assert "resnet18 needs torchvision" in capsys.readouterr().out
    assert main(["products", *arguments, "--models", "resnet18"]) == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--models", "lenet"], ["'lenet'", "toy784-wide", "resnet18"]),
        (["--implementations", "magic"], ["'magic'", "curvlinops"]),
        (["--threads", "0"], ["--threads 0", "1 or more"]),
        (["--device", "abacus"], ["'abacus'", "cpu"]),
    ],
)
def test_input_that_makes_no_sense(
    main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: list[str]
) -> None:
    assert main(["products", "--quick", *arguments, "--out", str(tmp_path / "out")]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and captured.err.startswith("benchmark.py: error: ")
    assert all(word in captured.err for word in words), captured.err
    assert captured.out == "" and not (tmp_path / "out").exists()


def test_options_of_other_commands_are_refused(main: Main, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["products", "--seeds", "1"])
    assert "--seeds" in capsys.readouterr().err


def test_every_library_says_how_to_get_it() -> None:
    for kind in IMPLEMENTATIONS.values():
        assert issubclass(kind, Product) and (kind.package is None) == (not kind.requirement)
