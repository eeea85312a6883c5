"""A run that was interrupted comes to the same end, bit for bit."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hessfree.lightning import HessianFreeMonitor
from tests.lightning.interrupted import BATCHES, Noisy, Stream, same, train
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


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize("steps", [5, 10, 20], ids=lambda steps: f"after {steps} of {BATCHES} an epoch")
def test_from_the_middle_of_an_epoch(tmp_path: Path, steps: int) -> None:
    straight = train(tmp_path / "straight")
    parts = tmp_path / "parts"
    parts.mkdir()
    (tmp_path / "straight" / f"step={steps}.ckpt").rename(parts / f"step={steps}.ckpt")
    resumed = train(parts)
    assert same(resumed, straight) and resumed["steps"] == 6 * BATCHES
    assert not same(resumed["parameters"], resumed["parameters"] + 1e-7)


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
