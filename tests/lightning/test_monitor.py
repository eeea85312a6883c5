"""HessianFreeMonitor: what it logs, where, and when it stops the Trainer."""

from __future__ import annotations

import importlib
import logging
import math
import warnings
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

import hessfree
from hessfree.lightning import HessianFreeMonitor
from hessfree.lightning.base import callback_classes
from hessfree.lightning.stagnation import Stagnation
from tests.lightning.modules import Regression, fit, flat, loader, network, quiet

EVERY_STEP = (
    "loss", "damping", "iterations", "residual", "step_norm", "gradient_norm", "accepted", "backend",
    "seconds_gradient", "seconds_setup", "seconds_solve", "seconds_evaluate",
)  # fmt: skip


class Logged(Regression):
    """Has a hyper-parameter and logs its loss."""

    def __init__(self, width: int = 5) -> None:
        super().__init__(lambda p: hessfree.HessianFree(p, damping_rule=hessfree.LevenbergMarquardt(every=2)))
        self.save_hyperparameters()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log("train_loss", loss)
        return loss


def test_pages_of_tensorboard(tmp_path: Path) -> None:
    module, logger = Logged(), TensorBoardLogger(tmp_path)
    fit(module, max_epochs=2, logger=logger, callbacks=[HessianFreeMonitor(every_n_steps=4)], log_every_n_steps=1)
    pages = EventAccumulator(logger.log_dir, {"images": 9, "histograms": 9})
    pages.Reload()
    assert len(module.reports) == 8
    for name in EVERY_STEP:
        assert [e.step for e in pages.Scalars(f"hessfree/{name}")] == list(range(8)), name
    shown = [e.value for e in pages.Scalars("hessfree/loss")]
    assert shown == pytest.approx([r.loss for r in module.reports], rel=1e-6)
    assert shown == [e.value for e in pages.Scalars("train_loss")]  # at the same steps as the user's own
    judged = [r for r in module.reports if not math.isnan(r.loss_after)]
    for name in ("loss_after", "reduction_ratio"):
        found = pages.Scalars(f"hessfree/{name}")
        assert [e.value for e in found] == pytest.approx([getattr(r, name) for r in judged], rel=1e-6)
        assert [e.step for e in found] == [r.step - 1 for r in judged] and 0 < len(judged) < 8
    assert [e.step for e in pages.Histograms("hessfree/log10_residual")] == [3, 7]
    histogram = pages.Histograms("hessfree/log10_residual")[0].histogram_value
    assert histogram.num == 4
    assert histogram.sum == pytest.approx(sum(math.log10(r.residual) for r in module.reports[:4]), rel=1e-5)
    figures = pages.Images("hessfree/residual_curve")
    assert [e.step for e in figures] == [3, 7] and figures[0].width > 400
    assert figures[0].encoded_image_string != figures[1].encoded_image_string
    text = {tag: pages.Tensors(tag)[0].tensor_proto.string_val[0].decode() for tag in pages.Tags()["tensors"]}
    assert "| hessfree/solver | `CG(max_iterations=3" in text["hessfree/settings/text_summary"]
    assert text["hessfree/cut/text_summary"] == "traced: outputs of Sequential"
    assert logger.hparams["hessfree/damping"] == 0.3 and logger.hparams["width"] == 5


def test_numbers_for_other_loggers_callbacks_and_the_progress_bar(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    best = ModelCheckpoint(tmp_path / "best", monitor="hessfree/damping", save_top_k=1)
    module = Logged()
    callbacks = [HessianFreeMonitor(), best]
    trainer = fit(module, logger=logger, callbacks=callbacks, enable_checkpointing=True, log_every_n_steps=1)
    last = module.reports[-1]
    assert float(best.best_model_score) == pytest.approx(last.damping)
    bar = {name: float(value) for name, value in trainer.progress_bar_metrics.items()}
    ratio = [r.reduction_ratio for r in module.reports if not math.isnan(r.reduction_ratio)][-1]
    assert bar == pytest.approx({"log10_damping": math.log10(last.damping), "rho": ratio, "cg": last.iterations})
    header, *rows = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
    column = header.split(",").index("hessfree/iterations")
    assert [float(row.split(",")[column]) for row in rows if row.split(",")[column]] == [3.0] * 4
    assert "hessfree/seed: 0" in (Path(logger.log_dir) / "hparams.yaml").read_text()


def test_it_changes_no_step() -> None:
    with_it, without = Logged(), Logged()
    fit(with_it, callbacks=[HessianFreeMonitor(every_n_steps=1)], max_epochs=2)
    fit(without, max_epochs=2)
    assert torch.equal(flat(with_it), flat(without))


def test_tells_how_many_micro_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where an epoch ends before a sum is full, and where a batch is skipped."""
    told: list[int | None] = []
    step = hessfree.HessianFree._accumulated

    def listen(optimizer: Any, recording: Any) -> float:
        told.append(optimizer.accumulated_batches)
        optimizer.accumulated_batches, kept = None, optimizer.accumulated_batches
        counted = step(optimizer, recording)
        optimizer.accumulated_batches = kept
        assert counted == kept
        return counted

    monkeypatch.setattr(hessfree.HessianFree, "_accumulated", listen)

    class Skipping(Regression):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor | None:
            return None if batch_idx == 5 else super().training_step(batch, batch_idx)

        def on_train_batch_end(self, *_: Any) -> None:
            pass

    module = Skipping()
    with pytest.warns(UserWarning, match="`training_step` returned `None`"):
        fit(module, loader(80, 8), accumulate_grad_batches=4, callbacks=[HessianFreeMonitor(whole_batches=False)])
    assert list(dict.fromkeys(told)) == [4, 3, 2]
    assert module.optimizers().accumulated_batches is None


class Watching(Regression):
    """Draws random numbers, changes buffers, logs, and counts what its hooks see."""

    def __init__(self) -> None:
        norm = torch.nn.BatchNorm1d(3, dtype=torch.float64)
        net = torch.nn.Sequential(norm, torch.nn.Dropout(0.3), network(torch.float64))
        super().__init__(net=net)
        self.seen: list[float] = []
        self.hooks = 0
        self.generator = torch.Generator().manual_seed(4)
        self.net[1].generator = torch.Generator().manual_seed(5)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 3:  # between the monitor's look and the last training step
            torch.rand(2, generator=self.generator)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        noise = [
            torch.randn(t.shape, generator=part.generator, dtype=t.dtype)
            for t, part in zip(batch, (self, self.net[1]), strict=True)
        ]
        loss = super().training_step([t + 0.1 * n for t, n in zip(batch, noise, strict=True)], batch_idx)
        self.log("mine", loss, on_step=False, on_epoch=True)
        if not hessfree.is_replaying():
            self.seen.append(float(loss.detach()))
        return loss

    def on_after_backward(self) -> None:
        self.hooks += 1


def test_micro_batches_taken_together_are_seen_once() -> None:
    modules, states, logged = [], [], []
    for callbacks in ([HessianFreeMonitor()], []):
        torch.manual_seed(1)
        module = Watching()
        torch.manual_seed(2)
        trainer = fit(module, loader(32, 8, torch.float64), accumulate_grad_batches=4, callbacks=callbacks)
        modules.append(module)
        generators = module.generator.get_state(), module.net[1].generator.get_state()
        states.append([torch.get_rng_state(), *generators, *module.buffers()])
        logged.append(float(trainer.callback_metrics["mine"]))
    together, last = modules
    assert together.seen == last.seen and together.hooks == last.hooks == 4 and logged[0] == logged[1]
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))
    # the very losses that the user saw: with the same masks and noise
    assert together.reports[0].loss == pytest.approx(sum(together.seen) / 4, rel=1e-12)
    assert last.reports[0].loss == pytest.approx(last.seen[-1] / 4, rel=1e-12)
    assert together.reports[0].reduction_ratio != pytest.approx(last.reports[0].reduction_ratio, rel=1e-3)


def test_hooks_that_change_gradients_act_on_the_sum() -> None:
    class Halving(Regression):
        def on_after_backward(self) -> None:
            for p in self.parameters():
                p.grad.mul_(0.5)

    ends = []
    for parts in (1, 4):
        module, data = Halving(net=network(torch.float64)), loader(64, 32 // parts, torch.float64)
        fit(module, data, accumulate_grad_batches=parts, callbacks=[HessianFreeMonitor()])
        assert len(module.reports) == 2
        ends.append(flat(module))
    way = (ends[0] - flat(network(torch.float64))).norm()
    assert float((ends[1] - ends[0]).norm()) <= 1e-10 * float(way)


@pytest.mark.parametrize(("settings", "parts", "times"), [({}, 4, 1), ({"whole_batches": False}, 4, 0), ({}, 1, 0)])
def test_says_once_what_whole_batches_cost(
    settings: dict[str, Any], parts: int, times: int, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the Trainer's own log, for a warning would end the runs of those who take warnings for errors."""
    monkeypatch.setattr(logging.getLogger("lightning.pytorch"), "propagate", True)
    caplog.set_level(logging.INFO, "lightning.pytorch")
    monitor = HessianFreeMonitor(**settings)
    fit(Regression(), loader(64, 8), max_epochs=2, accumulate_grad_batches=parts, callbacks=[monitor])
    said = [r for r in caplog.records if "whole_batches" in r.getMessage()]
    assert len(said) == times
    for record in said:
        assert record.name.startswith("lightning.pytorch.") and record.levelno == logging.INFO
        for words in ("all 4 micro-batches", "7 gradients", "HessianFreeMonitor(whole_batches=False)"):
            assert words in record.getMessage()


def test_a_part_of_a_batch_is_taken_of_the_last_micro_batch() -> None:
    """Curvature on a part of the batch was asked for: then the last micro-batch is enough."""
    module = Regression(lambda p: hessfree.HessianFree(p, curvature_batch=4))
    fit(module, loader(32, 8), accumulate_grad_batches=4, callbacks=[HessianFreeMonitor()])
    assert module.reports[0].curvature_samples == 4 and module.reports[0].backend == "traced"
    assert module.reports[0].loss == pytest.approx(module.outputs[-1], rel=1e-6)


class Stuck(Regression):
    """Every step is rejected from the third on."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss if self.global_step < 2 else loss + torch.nan


@pytest.mark.parametrize("batches_first", [None, 4])
def test_patience(tmp_path: Path, batches_first: int | None) -> None:
    """Stops after so many steps in vain, also where the run was interrupted among them."""
    ckpt = None
    if batches_first is not None:
        trainer = fit(Stuck(), loader(96, 8), max_steps=batches_first, callbacks=[HessianFreeMonitor(patience=4)])
        ckpt = tmp_path / "last.ckpt"
        trainer.save_checkpoint(ckpt)
        assert trainer.callbacks[0].state_dict() == {"stagnant_steps": {"hessfree/": 2}}
    with pytest.warns(UserWarning, match=r"4 steps in a row .*patience=4.*The last: step 6: loss nan, rejected"):
        trainer = fit(Stuck(), loader(96, 8), ckpt_path=ckpt, max_epochs=2, callbacks=[HessianFreeMonitor(patience=4)])
    assert trainer.global_step == 6


def test_stagnation() -> None:
    rule = Stagnation(patience=2, tolerance=1e-3)
    report = hessfree.StepReport(1, True, "accepted", loss=2.0)

    def gains(**changes: Any) -> bool:
        return not rule.gains_nothing(hessfree.StepReport(**(vars(report) | changes)))

    assert gains() and gains(loss_after=1.99) and gains(predicted_change=-0.01)
    assert not gains(accepted=False) and not gains(loss_after=1.999) and not gains(predicted_change=-1e-3)
    assert not gains(loss_after=2.5, predicted_change=-1.0)
    assert rule.count(3, report) == 0 and not rule.reached(1) and rule.reached(2)
    assert not Stagnation(None, 0.0).reached(10**9)


def test_two_optimizers_are_told_apart() -> None:
    class Two(Regression):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
            for optimizer in self.optimizers():
                optimizer.step(lambda o=optimizer: self.closure(batch, o))

        def closure(self, batch: list[Tensor], optimizer: Any) -> Tensor:
            loss = Regression.training_step(self, batch, 0)
            optimizer.zero_grad()
            self.manual_backward(loss)
            return loss

        def on_train_batch_end(self, *_: Any) -> None:
            pass

        def configure_optimizers(self) -> Any:
            parts = self.net[0], self.net[2]
            fixed = hessfree.ConstantDamping()
            return [
                hessfree.HessianFree(part.parameters(), damping=i + 1.0, damping_rule=fixed)
                for i, part in enumerate(parts)
            ]

    module = Two()
    trainer = fit(module, callbacks=[HessianFreeMonitor()], limit_train_batches=2)
    for i, optimizer in enumerate(module.optimizers()):
        assert optimizer.last_step.step == 2 and optimizer.last_step.damping == i + 1.0
        assert float(trainer.callback_metrics[f"hessfree/{i}/loss"]) == pytest.approx(optimizer.last_step.loss)
        assert optimizer.accumulated_batches is None


def test_without_a_hessian_free_optimizer_it_says_so() -> None:
    module = Regression(lambda p: torch.optim.SGD(p, lr=0.1))
    with pytest.warns(UserWarning, match=r"nothing to show: the optimizers are \['SGD'\]"):
        fit(module, callbacks=[HessianFreeMonitor()])


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"every_n_steps": 0}, "every_n_steps=0"),
        ({"patience": 0}, "patience=0"),
        ({"patience": True}, "patience=True"),
        ({"tolerance": math.nan}, "tolerance=nan"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        HessianFreeMonitor(**settings)


@pytest.mark.skipif(importlib.util.find_spec("pytorch_lightning") is None, reason="needs pytorch_lightning")
def test_the_other_namespace() -> None:
    """Here the monitor was made before it was known which Trainer it is for."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what importing it warns of
        other = importlib.import_module("pytorch_lightning")

    class Module(other.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.losses = network(), []

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            loss = torch.nn.functional.mse_loss(self.net(batch[0]), batch[1])
            self.log("loss", loss, on_step=False, on_epoch=True)
            return loss

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.losses.append(float(outputs["loss"]))

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return hessfree.HessianFree(self.parameters(), damping_rule=hessfree.LevenbergMarquardt(every=1))

    module, monitor = Module(), HessianFreeMonitor()
    trainer = other.Trainer(**quiet(max_epochs=1, callbacks=[monitor]))
    trainer.fit(module, loader())
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert logged["loss"] == pytest.approx(sum(module.losses) / 4, rel=1e-6)
    assert logged["hessfree/loss"] == pytest.approx(module.losses[-1]) and logged["hessfree/evaluations"] == 1
    assert set(callback_classes()) == {lightning.Callback, other.Callback}


def test_barebones() -> None:
    module = Regression()
    trainer = lightning.Trainer(barebones=True, max_epochs=1, accelerator="cpu", callbacks=[HessianFreeMonitor()])
    trainer.fit(module, loader())
    assert len(module.reports) == 4
