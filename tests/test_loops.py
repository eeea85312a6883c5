"""Loops as people write them: other optimizers beside ours, losses that change, autocast, copies."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hessfree import Armijo, HessianFree, LevenbergMarquardt
from tests.test_optimizer import PINNED, closure_for, flat, mlp, regression


@pytest.mark.parametrize("clear", ["none", "zero", "module"])
def test_replays_leave_the_gradients_of_another_optimizer_alone(clear: str) -> None:
    model, (x, y) = mlp(), regression()
    ours = HessianFree(model[:3].parameters(), damping_rule=LevenbergMarquardt(every=1), line_search=Armijo())
    other = torch.optim.SGD(model[3:].parameters(), lr=0.1)

    def closure() -> Tensor:
        ours.zero_grad()
        if clear == "module":
            model.zero_grad()
        else:
            other.zero_grad(set_to_none=clear == "none")
        loss = F.mse_loss(model(x), y)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        return loss

    ours.step(closure)
    gradients = [p.grad.clone() for p in model[3:].parameters()]
    assert abs(sum(float(g.square().sum()) for g in gradients)) > 0
    before = flat(model[3:].parameters())
    other.step()
    expected = before - 0.1 * torch.cat([g.reshape(-1) for g in gradients])
    assert (flat(model[3:].parameters()) - expected).norm() <= 1e-12


def test_the_cut_follows_a_loss_that_changes() -> None:
    torch.manual_seed(0)

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.a, self.b = nn.Linear(3, 6), nn.Linear(6, 2), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h = self.body(x).tanh()
            return self.a(h), self.b(h)

    model, (x, y) = Two().double(), regression()
    labels = torch.arange(40) % 3
    losses = {
        "a": lambda: F.mse_loss(model(x)[0], y),
        "both": lambda: (lambda z: F.mse_loss(z[0], y) + F.cross_entropy(z[1], labels))(model(x)),
        "penalty": lambda: F.mse_loss(model(x)[0], y) + 0.1 * model.a.weight.square().sum(),
    }
    optimizer = HessianFree(model.parameters(), **PINNED)
    for name in ("a", "both", "a", "penalty", "both"):
        twin = copy.deepcopy(model)
        optimizer.step(closure_for(optimizer, losses[name]))
        found, keep = flat(model.parameters()), model
        model = twin
        fresh = HessianFree(model.parameters(), **PINNED)
        fresh.step(closure_for(fresh, losses[name]))
        assert (found - flat(model.parameters())).norm() <= 1e-8 * found.norm(), name
        assert optimizer.last_step.cut == fresh.last_step.cut
        model = keep


def test_ratio_under_autocast_around_the_step() -> None:
    model, (x, y) = mlp(torch.float32), regression(dtype=torch.float32)
    optimizer = HessianFree(model.parameters(), damping_rule=LevenbergMarquardt(every=1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for _ in range(3):
            optimizer.step(closure_for(optimizer, lambda: F.mse_loss(model(x).float(), y)))
            assert 0.5 < optimizer.last_step.reduction_ratio < 1.5


def test_what_step_returns_holds_no_graph() -> None:
    model, (x, y) = mlp(), regression()
    optimizer = HessianFree(model.parameters())
    loss = optimizer.step(closure_for(optimizer, lambda: F.mse_loss(model(x), y)))
    assert loss.grad_fn is None
    assert float(loss) == optimizer.last_step.loss


def test_micro_batches_count_after_a_copy_and_a_new_dtype_is_followed() -> None:
    model, (x, y) = mlp(torch.float32), regression(dtype=torch.float32)
    optimizer = HessianFree(model.parameters())
    model.double()
    model, optimizer = copy.deepcopy((model, optimizer))
    x, y = x.double(), y.double()
    for _ in range(3):
        (F.mse_loss(model(x), y) / 4).backward()

    def closure() -> Tensor:
        loss = F.mse_loss(model(x), y) / 4
        loss.backward()
        return loss

    whole = mlp(torch.float32).double()
    other = HessianFree(whole.parameters())
    other.step(closure_for(other, lambda: F.mse_loss(whole(x), y)))
    optimizer.step(closure)
    assert (flat(model.parameters()) - flat(whole.parameters())).norm() <= 1e-10 * flat(whole.parameters()).norm()
