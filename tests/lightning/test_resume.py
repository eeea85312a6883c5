"""A run that was interrupted comes to the same end, bit for bit."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from hessfree.lightning import HessianFreeMonitor
from tests.lightning.interrupted import BATCHES, Noisy, Stream, differences, same, train
from tests.lightning.modules import fit, flat


def test_three_epochs_and_three_are_six(tmp_path: Path) -> None:
    straight, first, second = Noisy(), Noisy(), Noisy()
    trainer = fit(straight, Stream(), max_epochs=6)
    fit(first, Stream(), max_epochs=3).save_checkpoint(tmp_path / "half.ckpt")
    resumed = fit(second, Stream(), tmp_path / "half.ckpt", max_epochs=6)
    assert [r.step for r in second.reports] == list(range(3 * BATCHES + 1, 6 * BATCHES + 1))
    assert not torch.equal(flat(first), flat(straight))
    assert torch.equal(flat(second), flat(straight))
    assert same(resumed.optimizers[0].state_dict(), trainer.optimizers[0].state_dict())
    losses = [r.loss for r in straight.reports]
    assert [r.loss for r in first.reports + second.reports] == losses


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The checkpoints and the end of a run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("straight")
    return folder, train(folder)


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize("steps", [5, 10, 20, 30, 36], ids=lambda steps: f"after {steps} of {BATCHES} an epoch")
def test_a_resumed_run_saves_what_an_unbroken_one_saves(
    straight: tuple[Path, dict[str, Any]], tmp_path: Path, steps: int
) -> None:
    """Whatever checkpoint a run is resumed from, so that a chain of any length comes to the same end."""
    saved, end = straight
    shutil.copy(saved / f"step={steps}.ckpt", tmp_path)
    resumed = train(tmp_path)
    assert same(resumed, end) and resumed["steps"] == 6 * BATCHES
    assert not same(resumed["parameters"], resumed["parameters"] + 1e-7)
    names = sorted(path.name for path in saved.glob("*.ckpt") if int(path.stem.partition("=")[2]) >= steps)
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == names
    for name in names:
        assert list(differences(_resumable(tmp_path / name), _resumable(saved / name))) == []


def _resumable(path: Path) -> dict[str, Any]:
    """What a Trainer resumes from; how many files a ModelCheckpoint has written is no part of it."""
    held = torch.load(path, weights_only=False)
    return {name: held[name] for name in ("epoch", "global_step", "loops", "state_dict", "optimizer_states")}


def test_killed_at_random_moments() -> None:
    root = Path(__file__).parents[2]
    command = [sys.executable, "-W", "ignore", "-m", "tests.lightning.interrupted", "--kills", "2"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr + done.stdout
    assert "2 kills, " in done.stdout


def test_the_monitor_is_part_of_a_checkpoint(tmp_path: Path) -> None:
    trainer = fit(Noisy(), Stream(), callbacks=[HessianFreeMonitor(patience=3)])
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=False)["callbacks"]
    assert saved["HessianFreeMonitor"] == {"stagnant_steps": {"hessfree/": 0}}
