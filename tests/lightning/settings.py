"""One row a Trainer setting: train with it, and compare with the dense reference in float64.

`python -m tests.lightning.settings` prints the table with the errors found: ‖θ − reference‖ over the length of the
way that the reference went.
"""

from __future__ import annotations

import dataclasses
import math
import os
import warnings
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.fabric import Fabric
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from torch import Tensor
from torch.optim.lr_scheduler import ExponentialLR

import hessfree
from hessfree.lightning import HessianFreeMonitor
from tests.lightning import two_processes
from tests.lightning.modules import Regression, fit, flat, loader, network, points
from tests.lightning.reference import BATCHES, DAMPING, DOUBLE, SIZE, Reference, deviation, newton


def batches(dtype: torch.dtype = DOUBLE) -> list[tuple[Tensor, Tensor]]:
    """The batches that a loader of the same points gives."""
    x, y = points(BATCHES * SIZE, dtype)
    return list(zip(x.split(SIZE), y.split(SIZE), strict=True))


def trained(dtype: torch.dtype = DOUBLE, make: Any = newton, module: Any = None, **settings: Any) -> Any:
    """Train a module on the four batches."""
    module = Regression(make, network(dtype)) if module is None else module
    fit(module, loader(BATCHES * SIZE, SIZE, dtype), **settings)
    return module


def stepped(**how: Any) -> Reference:
    """Return the reference after a step on each batch."""
    reference = Reference(network(), DAMPING)
    for batch in batches():
        reference.step(batch, **how)
    return reference


def plain(dtype: torch.dtype = DOUBLE, **settings: Any) -> float:
    """Settings that should change nothing but rounding."""
    return deviation(flat(trained(dtype, **settings)), stepped())


def accumulated() -> float:
    reference = Reference(network(), DAMPING)
    first, second, third, fourth = batches()
    reference.step(first, second)
    reference.step(third, fourth)
    return deviation(flat(trained(accumulate_grad_batches=2)), reference)


def accumulated_whole() -> float:
    reference = Reference(network(), DAMPING)
    first, second, third, fourth = batches()
    reference.step(first, second, whole=True)
    reference.step(third, fourth, whole=True)
    module = trained(accumulate_grad_batches=2, callbacks=[HessianFreeMonitor()])
    return deviation(flat(module), reference)


def accumulated_damping() -> float:
    """20 steps of the default settings, each on 4 micro-batches of 8 rows, against steps on 32 rows: λ, and the way."""
    dampings, ends = [], []
    for parts in (1, 4):
        rule = hessfree.LevenbergMarquardt(every=1)
        module = Regression(lambda p, rule=rule: hessfree.HessianFree(p, damping_rule=rule), network(DOUBLE))
        data, monitor = loader(320, 32 // parts, DOUBLE), HessianFreeMonitor()
        fit(module, data, max_epochs=2, accumulate_grad_batches=parts, callbacks=[monitor])
        dampings.append([r.next_damping for r in module.reports])
        ends.append(flat(module))
    whole, accumulated = dampings
    if len(whole) != 20 or len(accumulated) != 20 or whole[-1] == whole[0]:
        return math.nan
    way = (ends[0] - flat(network(DOUBLE))).norm()
    return max(
        float((ends[1] - ends[0]).norm() / way), *(abs(a / w - 1) for a, w in zip(accumulated, whole, strict=True))
    )


def clipped_by_norm() -> float:
    def change(g: Tensor) -> Tensor:
        return g * min(1.0, 0.2 / (float(g.norm()) + 1e-6))  # as torch.nn.utils has it

    module = trained(gradient_clip_val=0.2, gradient_clip_algorithm="norm")
    return deviation(flat(module), stepped(change=change))


def clipped_by_value() -> float:
    module = trained(gradient_clip_val=0.05, gradient_clip_algorithm="value")
    return deviation(flat(module), stepped(change=lambda g: g.clamp(-0.05, 0.05)))


class Scheduled(Regression):
    """A learning rate that falls by half."""

    def __init__(self, interval: str) -> None:
        super().__init__(newton, network(DOUBLE))
        self.interval = interval

    def configure_optimizers(self) -> Any:
        optimizer = newton(self.parameters(), lr=0.8)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": ExponentialLR(optimizer, 0.5), "interval": self.interval},
        }


def scheduled(interval: str) -> float:
    reference = Reference(network(), DAMPING)
    for i, batch in enumerate(2 * batches()):
        reference.step(batch, lr=0.8 * 0.5 ** (i if interval == "step" else i // BATCHES))
    return deviation(flat(trained(module=Scheduled(interval), max_epochs=2)), reference)


class TwoByHand(Regression):
    """Manual optimization: each layer has its own optimizer, and they take turns on a batch."""

    def __init__(self) -> None:
        super().__init__(newton, network(DOUBLE))
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        for optimizer in self.optimizers():

            def closure(optimizer: Any = optimizer) -> Tensor:
                optimizer.zero_grad()
                loss = F.mse_loss(self.net(batch[0]), batch[1])
                self.manual_backward(loss)
                return loss

            with optimizer.toggle_model():
                optimizer.step(closure)

    def on_train_batch_end(self, *_: Any) -> None:
        pass

    def configure_optimizers(self) -> Any:
        return [newton(part.parameters()) for part in (self.net[0], self.net[2])]


def two_by_hand() -> float:
    reference = Reference(network(), DAMPING)
    for batch in batches():
        reference.step(batch, only=slice(0, 20))
        reference.step(batch, only=slice(20, None))
    return deviation(flat(trained(module=TwoByHand())), reference)


def exponential_average() -> float:
    reference, mean = Reference(network(), DAMPING), None
    for batch in batches():
        reference.step(batch)
        mean = reference.theta if mean is None else 0.75 * mean + 0.25 * reference.theta
    module = trained(callbacks=[EMAWeightAveraging(decay=0.75)])
    reference.theta = mean
    return deviation(flat(module), reference)


class RatesKept(Regression):
    """Remembers the learning rates that a callback's scheduler sets."""

    def __init__(self) -> None:
        super().__init__(newton, network(DOUBLE))
        self.rates: list[float] = []

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.rates.append(self.optimizers().param_groups[0]["lr"])


def weight_average() -> float:
    """The mean of the parameters at the starts of the second and third epochs, whose steps are shorter."""
    callback = StochasticWeightAveraging(0.5, swa_epoch_start=2, annealing_epochs=1, annealing_strategy="linear")
    module = trained(module=RatesKept(), callbacks=[callback], max_epochs=3)
    reference, starts = Reference(network(), DAMPING), []
    for i, rate in enumerate(module.rates):
        if i % BATCHES == 0:
            starts.append(reference.theta)
        reference.step(batches()[i % BATCHES], lr=rate)
    if len(starts) != 3 or module.rates[0] == module.rates[-1]:
        return math.nan
    reference.theta = torch.stack(starts[1:]).mean(0)
    return deviation(flat(module), reference)


def fabric(precision: Any = "64-true") -> float:
    fabric = Fabric(accelerator="cpu", devices=1, precision=precision)
    net = network()
    model, optimizer = fabric.setup(net, newton(net.parameters()))
    for x, y in batches(next(net.parameters()).dtype):

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            optimizer.zero_grad()
            loss = F.mse_loss(model(x), y)
            fabric.backward(loss)
            return loss

        optimizer.step(closure)
    return deviation(flat(net), stepped())


def compiled(whole: bool) -> float:
    """By the compiler's front end alone, which is all that an optimizer meets."""
    net = network(DOUBLE)
    if not whole:
        return deviation(flat(trained(module=Regression(newton, torch.compile(net, backend="eager")))), stepped())
    module = Regression(newton, net)
    fit(torch.compile(module, backend="eager"), loader(BATCHES * SIZE, SIZE, DOUBLE))
    return deviation(flat(module), stepped())


def ddp_of_one() -> float:
    with mock.patch.dict(os.environ):  # Lightning writes there how its processes find each other
        try:
            return deviation(flat(trained(strategy="ddp", use_distributed_sampler=False)), stepped())
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()


def ddp_of_two(name: str, steps: int) -> float:
    """Against the mean of both processes' losses; NaN unless these came to the same bits."""
    first, second = two_processes.both(name)
    if not torch.equal(first, second):
        return math.nan
    reference, dealt = Reference(network(), DAMPING), two_processes.dealt()
    for i in range(0, BATCHES, BATCHES // steps):
        reference.step(*(batch for both in dealt[i : i + BATCHES // steps] for batch in both), whole=True)
    return deviation(first, reference)


@dataclasses.dataclass(frozen=True)
class Row:
    """A setting, what the step is compared with, and how near it must be."""

    setting: str
    check: str
    error: Callable[[], float]
    bound: float


SAME = "dense steps in float64"
ROWS = (
    Row("precision 32-true", SAME, lambda: plain(torch.float32), 1e-5),
    Row("precision 64-true", SAME, lambda: plain(precision="64-true"), 1e-11),
    Row("precision bf16-true", SAME, lambda: plain(torch.float32, precision="bf16-true"), 0.1),
    Row("precision bf16-mixed", SAME, lambda: plain(torch.float32, precision="bf16-mixed"), 0.05),
    Row("accumulate_grad_batches=2", "mean gradient of two, curvature of the second", accumulated, 1e-11),
    Row("the same with HessianFreeMonitor", "mean gradient and mean curvature of two", accumulated_whole, 1e-11),
    Row(
        "accumulate_grad_batches=4 with it",
        "20 steps on whole batches: every λ, and the end",
        accumulated_damping,
        1e-10,
    ),
    Row("gradient_clip_val by norm", "clipped gradient, whole curvature", clipped_by_norm, 1e-11),
    Row("gradient_clip_val by value", "clipped gradient, whole curvature", clipped_by_value, 1e-11),
    Row("detect_anomaly", SAME, lambda: plain(detect_anomaly=True), 1e-11),
    Row("scheduler by step", "lr halved a step", lambda: scheduled("step"), 1e-11),
    Row("scheduler by epoch", "lr halved an epoch", lambda: scheduled("epoch"), 1e-11),
    Row("two optimizers by hand", "blocks of the matrix in turns", two_by_hand, 1e-11),
    Row("EMAWeightAveraging", "average of the reference's steps", exponential_average, 1e-11),
    Row("StochasticWeightAveraging", "mean over the reference's epochs", weight_average, 1e-11),
    Row("ddp, 1 process", SAME, ddp_of_one, 1e-11),
    Row("ddp, 2 processes", "mean of both processes' losses", lambda: ddp_of_two("pinned", 4), 1e-11),
    Row("ddp, 2 processes, accumulated", "mean of four", lambda: ddp_of_two("accumulated", 2), 1e-11),
    Row("Fabric, 64-true", SAME + "; Fabric rounds the outputs to float32", fabric, 1e-6),
    Row("Fabric, 32-true", SAME, lambda: fabric("32-true"), 1e-5),
    Row("torch.compile of the network", SAME, lambda: compiled(False), 1e-11),
    Row("torch.compile of the module", SAME, lambda: compiled(True), 1e-11),
)


def main() -> None:
    """Print the table."""
    warnings.simplefilter("ignore")
    print("| setting | compared with | error | bound |\n| --- | --- | --- | --- |")
    for row in ROWS:
        print(f"| {row.setting} | {row.check} | {row.error():.1e} | {row.bound:.0e} |", flush=True)


if __name__ == "__main__":
    main()
