"""What `Trainer(strategy="ddp")` does with two processes: `tests.distributed.pair` starts them, and runs these checks.

Each process takes every other sample of one fixed order. Lightning's own sampler deals them in the same way, but it
shuffles them always.
"""

from __future__ import annotations

import functools
import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import torch
import torch.distributed as dist
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import hessfree
from hessfree.lightning import HessianFreeMonitor
from tests.distributed import pair
from tests.lightning.modules import Regression, fit, flat, network, points
from tests.lightning.reference import BATCHES, DOUBLE, SIZE, newton

CHECKS: dict[str, Callable[[int], Any]] = {}


def check(function: Callable[[int], Any]) -> Callable[[int], Any]:
    CHECKS[function.__name__] = function
    return function


@functools.cache
def found() -> dict[str, tuple[Any, Any]]:
    """Return what the checks found on both ranks, in one start of two processes."""
    with tempfile.TemporaryDirectory() as folder:
        return pair.run("tests.lightning.two_processes", Path(folder))


def both(name: str) -> tuple[Any, Any]:
    """Return what a check found on both ranks."""
    for rank, result in enumerate(found()[name]):
        assert not isinstance(result, pair.Failed), f"rank {rank}: {result.words}"
        assert result is not None, f"rank {rank} never came to it"
    return found()[name]


def dealt() -> list[list[tuple[Tensor, Tensor]]]:
    """Return, for each step, the batches of the two ranks."""
    x, y = points(2 * BATCHES * SIZE, DOUBLE)
    halves = [list(zip(x[r::2].split(SIZE), y[r::2].split(SIZE), strict=True)) for r in range(2)]
    return [list(both) for both in zip(*halves, strict=True)]


def joined() -> DataLoader[Any]:
    """Both ranks' batches, one after the other, for a single process."""
    rows = [torch.cat(parts) for parts in zip(*(batch for step in dealt() for batch in step), strict=True)]
    return DataLoader(TensorDataset(*rows), batch_size=2 * SIZE)


def ddp(module: lightning.LightningModule, **settings: Any) -> lightning.Trainer:
    """Train on this rank's half."""
    rank = dist.get_rank()
    os.environ["LOCAL_RANK"] = str(rank)  # which tells Lightning that the processes are there already
    half = TensorDataset(*(t[rank::2] for t in points(2 * BATCHES * SIZE, DOUBLE)))
    data = DataLoader(half, batch_size=SIZE)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r".*isinstance\(treespec, LeafSpec\)", FutureWarning)  # Lightning's own
        return fit(module, data, strategy="ddp", devices=2, use_distributed_sampler=False, **settings)


class Logged(Regression):
    """Default settings but for λ, which changes at every step; what is logged goes over all ranks."""

    def __init__(self) -> None:
        rule = hessfree.LevenbergMarquardt(every=1)
        super().__init__(lambda p: hessfree.HessianFree(p, damping_rule=rule, weight_decay=1e-3), network(DOUBLE))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log("mine", loss, on_step=True, on_epoch=True, sync_dist=True)
        return loss


def summary(module: Logged, trainer: lightning.Trainer) -> dict[str, Any]:
    """Return what a run leaves, but for how long it took."""
    shown = trainer.callback_metrics | trainer.progress_bar_metrics
    return {
        "parameters": flat(module),
        "dampings": [r.next_damping for r in module.reports],
        "reports": [(r.status, r.backend, r.cut, r.loss, r.loss_after) for r in module.reports],
        "metrics": {name: float(value) for name, value in shown.items() if "seconds" not in name},
        "state": trainer.optimizers[0].state_dict(),
    }


@check
def pinned(rank: int) -> Any:
    module = Regression(newton, network(DOUBLE))
    ddp(module)
    return flat(module)


@check
def watched(rank: int) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        logger, module = CSVLogger(folder), Logged()
        callbacks = [HessianFreeMonitor(patience=50)]
        trainer = ddp(module, max_epochs=3, logger=logger, callbacks=callbacks, log_every_n_steps=1)
        written = list(Path(folder).rglob("metrics.csv"))
        lines = written[0].read_text().splitlines() if written else []
    return summary(module, trainer), lines


@check
def accumulated(rank: int) -> Any:
    module = Regression(newton, network(DOUBLE))
    ddp(module, accumulate_grad_batches=2, callbacks=[HessianFreeMonitor()])
    return flat(module)


@check
def trouble(rank: int) -> Any:
    """The second rank fails at its second batch."""

    class Failing(Regression):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            if rank == 1 and batch_idx == 1:
                raise ValueError("no such sample")
            return super().training_step(batch, batch_idx)

    module = Failing(newton, network(DOUBLE))
    try:
        ddp(module)
    except Exception as error:
        return f"{type(error).__name__}: {error}", flat(module)
    return "", flat(module)
