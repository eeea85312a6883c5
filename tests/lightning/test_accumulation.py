"""Micro-batches of a classifier under HessianFreeMonitor: a step is that of all of them, whatever their sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import hessfree
from hessfree.lightning import HessianFreeMonitor
from tests.lightning.modules import Regression, fit, flat, points

DOUBLE = torch.float64


class Classification(Regression):
    """Cross-entropy in the place of the squared error."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.net(x), y)


def classifier(classes: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, classes)).to(DOUBLE)


def optimizer_of(parameters: Any) -> hessfree.HessianFree:
    return hessfree.HessianFree(parameters, damping_rule=hessfree.LevenbergMarquardt(every=1))


def by_hand(net: nn.Module, steps: list[list[tuple[Tensor, Tensor]]]) -> list[float]:
    """Step on the micro-batches of each step as one batch, whose samples have the weights of a mean of means."""
    optimizer, dampings = optimizer_of(net.parameters()), []
    for parts in steps:
        x, y = (torch.cat(t) for t in zip(*parts, strict=True))
        weights = torch.cat([torch.full((len(t),), 1 / (len(t) * len(parts)), dtype=DOUBLE) for _, t in parts])

        def closure(x: Tensor = x, y: Tensor = y, weights: Tensor = weights) -> Tensor:
            optimizer.zero_grad()
            loss = weights @ F.cross_entropy(net(x), y, reduction="none")
            loss.backward()
            return loss

        optimizer.step(closure)
        assert optimizer.last_step is not None
        dampings.append(optimizer.last_step.next_damping)
    return dampings


# micro-batches a step, classes, rows an epoch, rows a micro-batch, epochs: three steps each
CASES = {
    "4 of 8 rows": (4, 3, 96, 8, 1),
    "8 of 4 rows, 10 classes": (8, 10, 96, 4, 1),
    "3 of 8 rows and one of 6": (4, 3, 30, 8, 3),
}


@pytest.mark.parametrize("name", CASES)
def test_a_classifier_steps_as_on_whole_batches(name: str) -> None:
    count, classes, rows, size, epochs = CASES[name]
    x, targets = points(rows, DOUBLE)
    y = (5 * targets[:, 0]).round().long() % classes
    parts = list(zip(x.split(size), y.split(size), strict=True))
    net = classifier(classes)
    start = flat(net)
    expected = by_hand(net, [parts[i : i + count] for i in range(0, len(parts), count)] * epochs)
    module = Classification(optimizer_of, classifier(classes))
    data = DataLoader(TensorDataset(x, y), batch_size=size)
    fit(module, data, max_epochs=epochs, accumulate_grad_batches=count, callbacks=[HessianFreeMonitor()])
    assert len(module.reports) == len(expected) == 3 and len(set(expected)) > 1
    assert [r.next_damping for r in module.reports] == pytest.approx(expected, rel=1e-9)
    assert float((flat(module) - flat(net)).norm()) <= 1e-9 * float((flat(net) - start).norm())
