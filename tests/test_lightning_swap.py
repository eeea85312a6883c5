"""The one-line swap in a LightningModule under automatic optimization."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import hessfree

lightning = pytest.importorskip("lightning")


class FlowModule(lightning.LightningModule):
    """Conditional flow matching whose training step draws its own noise."""

    def __init__(self, optimizer: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 32), nn.SELU(), nn.Linear(32, 32), nn.SELU(), nn.Linear(32, 2))
        self.name = optimizer
        self.losses: list[float] = []
        self.reports: list[hessfree.StepReport | None] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        (x1,) = batch
        x0, t = torch.randn_like(x1), torch.rand(len(x1), 1)
        loss = F.mse_loss(self.net(torch.cat([torch.lerp(x0, x1, t), t], 1)), x1 - x0)
        self.log("loss", loss)
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(float(outputs["loss"]))
        self.reports.append(getattr(self.optimizers().optimizer, "last_step", None))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.name == "adam":
            return torch.optim.Adam(self.parameters(), lr=1e-3)
        return hessfree.HessianFree(self.parameters())


def fit(optimizer: str, **settings: Any) -> FlowModule:
    angle = torch.arange(8) * torch.pi / 4
    centres = 5 * torch.stack([angle.cos(), angle.sin()], 1)
    data = centres.repeat(64, 1) + 0.3 * torch.randn(512, 2, generator=torch.Generator().manual_seed(2))
    module = FlowModule(optimizer)
    torch.manual_seed(1)
    trainer = lightning.Trainer(
        max_epochs=4, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, **settings,
    )  # fmt: skip
    trainer.fit(module, DataLoader(TensorDataset(data), batch_size=128, shuffle=True))
    return module


def test_swapping_the_optimizer_is_one_line() -> None:
    adam, ours = fit("adam"), fit("hessfree")
    assert len(ours.losses) == len(adam.losses) == 16
    # the first batch, its order and its noise are those that Adam saw
    reports = [r for r in ours.reports if r is not None]
    assert reports[0].loss == adam.losses[0]
    assert [r.step for r in reports] == list(range(1, 17))
    assert sum(r.loss for r in reports[-4:]) < 0.6 * sum(adam.losses[-4:])


@pytest.mark.parametrize(
    "settings",
    [{"accumulate_grad_batches": 2}, {"gradient_clip_val": 0.5}, {"precision": "bf16-mixed"}, {"precision": "64-true"}],
    ids=str,
)
def test_common_trainer_settings(settings: dict[str, Any]) -> None:
    module = fit("hessfree", **settings)
    reports = [r for r in module.reports if r is not None]
    assert all(r.accepted for r in reports[-3:])
    assert module.losses[-1] < module.losses[0]
