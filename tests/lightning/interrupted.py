"""Kill a training run at random moments, resume it from its last checkpoint, and compare the ends bit for bit.

`python -m tests.lightning.interrupted --kills 20` prints what was found. Every run is a fork of one process that has
imported everything and computed nothing, so that a start takes no time.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import random
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

import hessfree
from hessfree.lightning import HessianFreeMonitor
from tests.lightning.modules import Regression, fit, flat, points

BATCHES, SIZE, EPOCHS, SAVE_EVERY = 6, 8, 6, 5


class Stream:
    """Batches in an order drawn for each epoch; like a StatefulDataLoader it knows where it stands."""

    def __init__(self) -> None:
        self.epoch = self.position = 0

    def __len__(self) -> int:
        return BATCHES

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        x, y = points(BATCHES * SIZE)
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(self.epoch)).split(SIZE)
        while self.position < BATCHES:
            self.position += 1
            rows = order[self.position - 1]
            yield x[rows], y[rows]

    @property
    def sampler(self) -> Stream:
        """Where a Trainer looks for `set_epoch`."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch, or go on in it: a Trainer that resumes between two epochs restores no loader."""
        if epoch != self.epoch:
            self.epoch, self.position = epoch, 0

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.position = state["epoch"], state["position"]


class Noisy(Regression):
    """Noise that depends on the step alone, for a Trainer's checkpoint holds no random states."""

    def __init__(self) -> None:
        momentum, rule = hessfree.QuadraticModelMomentum(), hessfree.LevenbergMarquardt(every=2)
        super().__init__(lambda p: hessfree.HessianFree(p, momentum=momentum, damping_rule=rule, weight_decay=1e-3))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(self.global_step))
        return F.mse_loss(self.net(x + 0.1 * noise), y)


def train(folder: Path, epochs: int = EPOCHS) -> dict[str, Any]:
    """Train, from the last checkpoint in `folder` if there is one, and return what the end looks like."""
    found = sorted(folder.glob("*.ckpt"), key=lambda path: int(path.stem.partition("=")[2]))
    save = ModelCheckpoint(
        folder, "{step}", every_n_train_steps=SAVE_EVERY, save_top_k=-1, save_on_train_epoch_end=False
    )
    module = Noisy()
    callbacks = [save, HessianFreeMonitor()]
    ckpt_path = found[-1] if found else None
    trainer = fit(module, Stream(), ckpt_path, max_epochs=epochs, callbacks=callbacks, enable_checkpointing=True)
    state = trainer.optimizers[0].state_dict()
    return {"parameters": flat(module), "state": state, "steps": trainer.global_step}


def same(first: Any, second: Any) -> bool:
    """Tell whether two nestings hold the same bits."""
    if isinstance(first, Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(value, second[key]) for key, value in first.items())
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return bool(first == second)


def _run(folder: Path) -> None:
    logging.disable(logging.INFO)
    warnings.simplefilter("ignore")
    end = train(folder)
    torch.save(end, folder / "end.part")
    (folder / "end.part").rename(folder / "end.pt")


def interrupt(kills: int, seed: int, work: Path) -> tuple[int, int]:
    """Kill runs until there were so many kills.

    Args:
        kills: How many.
        seed: Of the moments.
        work: A folder.

    Returns:
        How many runs came to their end, and how many of them to the end of the run that nobody disturbed.
    """
    fork, moments = multiprocessing.get_context("fork"), random.Random(seed)

    def start(folder: Path) -> Any:
        folder.mkdir(exist_ok=True)
        process = fork.Process(target=_run, args=(folder,))
        process.start()
        return process

    started = time.monotonic()
    start(work / "straight").join()
    seconds = time.monotonic() - started
    straight = torch.load(work / "straight" / "end.pt", weights_only=False)
    runs = equal = killed = 0
    while killed < kills or (work / f"run{runs}").exists():
        folder = work / f"run{runs}"
        process = start(folder)
        process.join(moments.uniform(0, seconds) if killed < kills else None)
        if process.exitcode is None:
            process.kill()
            process.join()
            killed += 1
            steps = max((int(path.stem.partition("=")[2]) for path in folder.glob("*.ckpt")), default=0)
            print(f"kill {killed}: the last checkpoint is of step {steps}", flush=True)
            continue
        if process.exitcode:
            raise RuntimeError(f"run {runs} ended with code {process.exitcode}")
        equal += same(torch.load(folder / "end.pt", weights_only=False), straight)
        runs += 1
    return runs, equal


def main() -> None:
    """Parse the command line, kill, and say what came of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        runs, equal = interrupt(arguments.kills, arguments.seed, Path(work))
    print(f"{arguments.kills} kills, {runs} runs came to their end, {equal} of them to the same bits")
    if equal != runs:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
