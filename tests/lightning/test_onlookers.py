"""What the user logs: each batch once, however often a step evaluates it."""

from __future__ import annotations

import importlib
from collections import Counter
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
import torch.nn.functional as F
import torchmetrics
from lightning.fabric import Fabric
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

import hessfree
from hessfree.recording import onlookers
from tests.lightning.modules import Regression, fit, network, points


def often(parameters: Any) -> hessfree.HessianFree:
    """An optimizer that evaluates the loss again at every step, and finds steps too long at first."""
    return hessfree.HessianFree(
        parameters, lr=8.0, damping_rule=hessfree.LevenbergMarquardt(every=1), line_search=hessfree.Armijo()
    )


def adam(parameters: Any) -> torch.optim.Optimizer:
    """The counts of a step that evaluates once."""
    return torch.optim.Adam(parameters, lr=0.0)


class Watched(Regression):
    """Logs in all the ways there are."""

    def __init__(self, make: Any) -> None:
        super().__init__(make)
        self.mean, self.updated = torchmetrics.MeanMetric(), torchmetrics.MeanSquaredError()
        self.values = torchmetrics.CatMetric()
        regression = {"mse": torchmetrics.MeanSquaredError(), "mae": torchmetrics.MeanAbsoluteError()}
        self.collection = torchmetrics.MetricCollection(regression | {"again": torchmetrics.MeanSquaredError()})
        self.losses: list[float] = []
        self.calls: Counter[str] = Counter()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        z = self.net(x)
        loss = F.mse_loss(z, y)
        self.calls["training_step"] += 1
        if not hessfree.is_replaying():
            self.losses.append(loss.item())
        self.log("now", loss, on_step=True, on_epoch=False)
        self.log_dict({"epoch": loss}, on_step=False, on_epoch=True)
        self.log("batch_mean", self.mean(loss), on_step=False, on_epoch=True)
        self.updated.update(z, y)
        self.log("updated", self.updated, on_step=False, on_epoch=True)
        self.values.update(loss.detach())
        self.collection.update(z, y)
        if self.logger is not None:
            assert isinstance(self.logger, CSVLogger) and isinstance(self.logger.log_dir, str)
            self.logger.log_metrics({"direct": loss.item()}, step=batch_idx)
            self.logger.experiment.log_metrics({"experiment": loss.item()}, step=batch_idx)
        self.print(f"batch {batch_idx}")
        return loss

    def on_before_zero_grad(self, optimizer: Any) -> None:
        self.calls["on_before_zero_grad"] += 1

    def on_before_backward(self, loss: Tensor) -> None:
        self.calls["on_before_backward"] += 1

    def on_after_backward(self) -> None:
        self.calls["on_after_backward"] += 1

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.calls["on_before_optimizer_step"] += 1
        self.log("gradient", torch.stack([p.grad.norm() for p in self.parameters()]).norm())


class Counting(lightning.Callback):
    """A user's callback."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()

    def on_before_zero_grad(self, *_: Any) -> None:
        self.calls["on_before_zero_grad"] += 1

    def on_after_backward(self, *_: Any) -> None:
        self.calls["on_after_backward"] += 1


def test_every_batch_is_seen_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module, callback = Watched(often), Counting()
    logger = CSVLogger(tmp_path, flush_logs_every_n_steps=1)
    trainer = fit(module, logger=logger, callbacks=[callback], log_every_n_steps=1, enable_progress_bar=False)
    assert len(module.reports) == 4 and sum(r.evaluations for r in module.reports) > 4
    assert module.calls["training_step"] > 8
    losses = [r.loss for r in module.reports]
    assert module.losses == losses == module.outputs
    seen = {name: float(value) for name, value in trainer.logged_metrics.items()}
    assert seen["now"] == losses[-1]
    mean = float(torch.tensor(losses).mean())
    for name in ("epoch", "batch_mean", "updated"):
        assert seen[name] == pytest.approx(mean, rel=1e-6), name
    assert torch.equal(module.values.compute(), torch.tensor(losses))
    assert module.collection["mse"].update_count == module.collection["again"].update_count == 4
    assert float(module.collection.compute()["again"]) == pytest.approx(mean, rel=1e-6)
    for name in ("on_before_zero_grad", "on_before_backward", "on_after_backward", "on_before_optimizer_step"):
        assert module.calls[name] == 4, name
    assert callback.calls == {"on_before_zero_grad": 4, "on_after_backward": 4}
    assert capsys.readouterr().out.split() == [word for i in range(4) for word in ("batch", str(i))]
    progress = trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer
    assert progress.zero_grad.total.ready == progress.zero_grad.total.completed == progress.step.total.completed == 4
    rows = [line.split(",") for line in (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()]
    for name in ("direct", "experiment", "now"):
        column = rows[0].index(name)
        written = [float(row[column]) for row in rows[1:] if row[column]]
        assert written == pytest.approx(losses, rel=1e-6), name


def test_the_same_calls_as_with_another_optimizer() -> None:
    ours, plain = Watched(often), Watched(adam)
    fit(ours)
    fit(plain)
    assert ours.calls.pop("training_step") > plain.calls.pop("training_step") == 4
    assert ours.calls == plain.calls


class ByHand(Watched):
    """Manual optimization."""

    def __init__(self, make: Any) -> None:
        super().__init__(make)
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        optimizer = self.optimizers()

        def closure() -> Tensor:
            loss = Watched.training_step(self, batch, batch_idx)
            optimizer.zero_grad()
            self.manual_backward(loss)
            return loss

        optimizer.step(closure)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.reports.append(self.optimizers().last_step)


def test_manual_optimization() -> None:
    module = ByHand(often)
    trainer = fit(module)
    losses = [r.loss for r in module.reports]
    assert module.calls["training_step"] > 8 and module.losses == losses
    assert float(trainer.logged_metrics["epoch"]) == pytest.approx(float(torch.tensor(losses).mean()), rel=1e-6)
    assert module.calls["on_after_backward"] == 4


def test_fabric(tmp_path: Path) -> None:
    logger = Recorder()
    fabric = Fabric(accelerator="cpu", devices=1, loggers=[logger], callbacks=[logger])
    net = network()
    model, optimizer = fabric.setup(net, often(net.parameters()))
    x, y = points()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        fabric.log("loss", loss)
        fabric.logger.log_metrics({"direct": loss.item()})
        fabric.call("on_loss")
        fabric.backward(loss)
        return loss

    for _ in range(3):
        optimizer.step(closure)
    assert optimizer.last_step.evaluations > 0
    assert logger.calls == {"loss": 3, "direct": 3, "on_loss": 3}


class Recorder(CSVLogger):
    """Counts what it is told."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.calls.update(metrics.keys())

    def on_loss(self) -> None:
        self.calls["on_loss"] += 1


def test_a_metric_in_a_plain_loop() -> None:
    net, metric, (x, y) = network(), torchmetrics.MeanMetric(), points()
    optimizer = often(net.parameters())

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.mse_loss(net(x), y)
        metric.update(loss.detach())
        loss.backward()
        return loss

    losses = [float(optimizer.step(closure)) for _ in range(3)]
    assert metric.update_count == 3
    assert float(metric.compute()) == pytest.approx(float(torch.tensor(losses).mean()), rel=1e-6)


def test_everything_is_put_back_after_an_error() -> None:
    before = _watched_functions()
    net, (x, y), metric = network(), points(), torchmetrics.SumMetric()
    optimizer, calls = often(net.parameters()), []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.mse_loss(net(x), y)
        metric.update(1.0)
        loss.backward()
        calls.append(hessfree.is_replaying())
        if calls[-1]:
            assert _watched_functions() != before
            raise KeyError("in a replay")
        return loss

    with pytest.raises(KeyError):
        optimizer.step(closure)
    assert calls == [False, True] and not hessfree.is_replaying()
    assert _watched_functions() == before
    assert float(metric.compute()) == 1


def _watched_functions() -> list[Any]:
    """Fails where a release of Lightning has other names than those that are exchanged."""
    found = []
    for module, owner, name, _ in onlookers._WATCHERS:
        if module.startswith(("lightning.", "torchmetrics")):
            place = importlib.import_module(module)
            found.append(vars(place if owner is None else getattr(place, owner))[name])
    return found


def test_a_user_hook_on_the_network_can_ask() -> None:
    """A forward hook may be what computes the network (weight norm), so it runs in replays too."""
    net, (x, y) = network(), points()
    seen: list[bool] = []
    net.register_forward_hook(lambda *_: seen.append(hessfree.is_replaying()))
    optimizer = often(net.parameters())

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.mse_loss(net(x), y)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert seen.count(False) == 1 and seen.count(True) >= 2
