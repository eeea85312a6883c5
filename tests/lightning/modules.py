"""A small module and trainers for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import hessfree

Make = Callable[[Any], torch.optim.Optimizer]


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    """P = 32 parameters in the seeded state that every test starts from."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).to(dtype)


def points(count: int = 32, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Inputs and targets of a regression, `[count, 3]` and `[count, 2]`."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(count, 3, generator=generator)
    return x.to(dtype), torch.stack([x.prod(1), x.sum(1).sin()], 1).to(dtype)


def loader(count: int = 32, batch: int = 8, dtype: torch.dtype = torch.float32) -> DataLoader[Any]:
    """The points in fixed order."""
    return DataLoader(TensorDataset(*points(count, dtype)), batch_size=batch)


class Regression(lightning.LightningModule):
    """Mean squared error; remembers each step's report and the parameters after it."""

    def __init__(self, make: Make | None = None, net: nn.Module | None = None) -> None:
        super().__init__()
        self.net = network() if net is None else net
        self.make = make or (lambda parameters: hessfree.HessianFree(parameters))
        self.reports: list[hessfree.StepReport] = []
        self.outputs: list[float] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return F.mse_loss(self.net(x), y)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.outputs.append(float(outputs["loss"]))
        report = getattr(self.optimizers(), "last_step", None)
        if report is not None and (not self.reports or report is not self.reports[-1]):
            self.reports.append(report)

    def configure_optimizers(self) -> Any:
        return self.make(self.parameters())


def quiet(**settings: Any) -> dict[str, Any]:
    """Settings of a Trainer that writes and prints nothing."""
    defaults = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return defaults | settings


def fit(module: Any, data: Any = None, ckpt_path: Any = None, **settings: Any) -> lightning.Trainer:
    """Train `module` and return the trainer."""
    trainer = lightning.Trainer(**quiet(**({"max_epochs": 1} | settings)))
    trainer.fit(module, loader() if data is None else data, ckpt_path=ckpt_path)
    return trainer


def flat(module: nn.Module) -> Tensor:
    """Return the parameters as one vector, a copy."""
    return torch.cat([p.detach().flatten() for p in module.parameters()]).clone()
