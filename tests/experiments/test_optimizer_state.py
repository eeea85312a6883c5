"""Optimizers of others, saved to a file and loaded into new ones: equal to the last bit to those that go on."""

import io
from typing import Any

import pytest
import torch
from torch import nn

from experiments.optimizers import MuonSettings, Settings, ShampooSettings

STEPS, SAVED = 34, 27  # Shampoo preconditions from its 25th step on


def network(kernel: bool = False) -> nn.Module:
    torch.manual_seed(0)
    first = [nn.Unflatten(1, (1, 8)), nn.Conv1d(1, 4, 5, stride=4, padding=2), nn.Flatten()]
    return nn.Sequential(*(first if kernel else [nn.Linear(8, 8)]), nn.Tanh(), nn.Linear(8, 5))


def train(model: nn.Module, optimizer: Any, steps: range) -> None:
    for step in steps:
        for group in optimizer.param_groups:
            group["lr"] = 0.1 / (1 + step)  # as the training loop does
        x = torch.randn(16, 8, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        (model(x) - x[:, :5].sin()).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize(
    ("settings", "kernel"),
    # of these two layers one has blocks of one size, and the other of two
    [
        (MuonSettings(lr=0.1, weight_decay=0.01), False),
        (MuonSettings(lr=0.1), True),
        (ShampooSettings(lr=0.1, every=3, widest=8), False),
    ],
    ids=["muon", "muon with a kernel", "shampoo"],
)
def test_saved_and_loaded(settings: Settings, kernel: bool) -> None:
    model = network(kernel)
    optimizer = settings.build(model.parameters(), 0)
    train(model, optimizer, range(SAVED))
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], file)
    train(model, optimizer, range(SAVED, STEPS))

    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    assert len(state["state"]) == 4  # parameters
    again = network(kernel)
    loaded = settings.build(again.parameters(), 0)
    again.load_state_dict(weights)
    loaded.load_state_dict(state)
    train(again, loaded, range(SAVED, STEPS))
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other) and one.isfinite().all()


def test_loading_where_no_step_was_made() -> None:
    model = network()
    settings = ShampooSettings(lr=0.1)
    fresh = settings.build(model.parameters(), 0).state_dict()
    assert fresh["state"] == {}
    optimizer = settings.build(model.parameters(), 0)
    train(model, optimizer, range(1))
    optimizer.load_state_dict(fresh)
    assert not optimizer.state and all(parameter.grad is not None for parameter in model.parameters())
