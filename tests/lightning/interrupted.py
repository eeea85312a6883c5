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


class SaveWithin(ModelCheckpoint):
    """Saves every few batches, but never at an epoch's last.

    Lightning (2.6) takes what is saved there for the middle of the epoch. The run resumed from it goes on rightly, but
    counts an epoch too few, and a run resumed from one of *its* checkpoints trains an epoch too many. What
    `on_train_epoch_end` saves is counted rightly.
    """

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if not trainer.is_last_batch:
            super().on_train_batch_end(trainer, *args)


def train(folder: Path, epochs: int = EPOCHS) -> dict[str, Any]:
    """Train, from the last checkpoint in `folder` if there is one, and return what the end looks like."""
    last = last_step(folder)
    within = SaveWithin(folder, "{step}", every_n_train_steps=SAVE_EVERY, save_top_k=-1, save_on_train_epoch_end=False)
    between = ModelCheckpoint(folder, "{step}", every_n_epochs=1, save_top_k=-1, save_on_train_epoch_end=True)
    module = Noisy()
    callbacks = [within, between, HessianFreeMonitor()]
    ckpt_path = folder / f"step={last}.ckpt" if last else None
    trainer = fit(module, Stream(), ckpt_path, max_epochs=epochs, callbacks=callbacks, enable_checkpointing=True)
    state = trainer.optimizers[0].state_dict()
    return {"parameters": flat(module), "state": state, "steps": trainer.global_step}


def differences(first: Any, second: Any, place: str = "end") -> Iterator[str]:
    """Yield the places where two nestings do not hold the same bits."""
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        if first.dtype != second.dtype or not torch.equal(first, second):
            yield place
    elif isinstance(first, dict) and isinstance(second, dict) and first.keys() == second.keys():
        for key, value in first.items():
            yield from differences(value, second[key], f"{place}[{key!r}]")
    elif isinstance(first, list | tuple) and isinstance(second, list | tuple) and len(first) == len(second):
        for i, (a, b) in enumerate(zip(first, second, strict=True)):
            yield from differences(a, b, f"{place}[{i}]")
    elif type(first) is not type(second) or isinstance(first, dict | list | tuple) or first != second:
        yield f"{place}: {first!r} and {second!r}"


def same(first: Any, second: Any) -> bool:
    """Tell whether two nestings hold the same bits."""
    return next(differences(first, second), None) is None


def last_step(folder: Path) -> int:
    """Return the step of the last checkpoint; 0 where there is none."""
    return max((int(path.stem.partition("=")[2]) for path in folder.glob("*.ckpt")), default=0)


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
    chain: list[int] = []
    while killed < kills or (work / f"run{runs}").exists():
        folder = work / f"run{runs}"
        chain.append(last_step(folder))
        process = start(folder)
        process.join(moments.uniform(0, seconds) if killed < kills else None)
        if process.exitcode is None:
            process.kill()
            process.join()
            killed += 1
            print(f"kill {killed}: the last checkpoint is of step {last_step(folder)}", flush=True)
            continue
        if process.exitcode:
            raise RuntimeError(f"run {runs} ended with code {process.exitcode}")
        found = list(differences(torch.load(folder / "end.pt", weights_only=False), straight))
        if found:
            print(f"run {runs}, begun and resumed at steps {chain}, ended elsewhere: {'; '.join(found)}", flush=True)
        equal += not found
        runs, chain = runs + 1, []
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
