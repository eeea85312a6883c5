"""A step whose loss nobody evaluated is judged by the next one's first look: where it led astray, it is taken back."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from hessfree import ConstantDamping, HessianFree, Identity, LevenbergMarquardt
from tests.test_optimizer import closure_for


class Steep(nn.Module):
    """exp(w) - 1, whose Gauss-Newton step from -1.5 leads to 1.98 and a loss 64 times as high."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([-1.5], dtype=torch.float64))

    def forward(self) -> Tensor:
        return self.w.exp() - 1


def test_an_unseen_explosion_is_taken_back() -> None:
    """A step that nobody evaluated, after which the loss is not finite, is undone by the next one."""
    w = nn.Parameter(torch.tensor([1.0]))

    class Well(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = w

        def forward(self) -> Tensor:
            return torch.where(self.w > 0, self.w.abs().sqrt() - 3, math.nan)

    model = Well()
    optimizer = HessianFree(
        model.parameters(), damping=0.0, preconditioner=Identity(), damping_rule=ConstantDamping(), lr=0.0
    )
    closure = closure_for(optimizer, lambda: model().square().sum())
    optimizer.step(closure)  # no step at all: it only learns that the closure can be replayed
    optimizer.param_groups[0]["lr"] = 1.0
    w.data.fill_(36.0)  # the Gauss-Newton step from 36 leads to 36 - 2*6*3 = 0, where the loss is not a number
    optimizer.step(closure)
    assert optimizer.last_step.accepted
    assert float(w.detach()) <= 1e-4
    w.data.clamp_(max=0)
    optimizer.step(closure)
    assert "taken back" in optimizer.last_step.status
    assert abs(float(w.detach()) - 36) <= 1e-3


@pytest.mark.parametrize("harder", [1.0, 1e3])
def test_a_loss_that_leaps_takes_the_unseen_step_back_that_led_there(harder: float) -> None:
    """From a batch's own loss before the step one sees whether the step is to blame, or the batch is a harder one."""
    model, scale = Steep(), torch.ones((), dtype=torch.float64)
    rule = LevenbergMarquardt(every=5, minimum=0.0)
    optimizer = HessianFree(model.parameters(), lr=0.0, damping=1e-6, preconditioner=Identity(), damping_rule=rule)
    closure = closure_for(optimizer, lambda: (scale * model()).square().sum())
    optimizer.step(closure)  # no step at all: it only learns that the closure can be replayed
    optimizer.param_groups[0]["lr"] = 1.0
    if harder == 1:  # the same batch again
        optimizer.step(closure)
        assert optimizer.last_step.accepted and optimizer.last_step.evaluations == 0
        assert float(model.w.detach()) > 1.9
        optimizer.step(closure)
        assert "leapt from 0.603" in optimizer.last_step.status and "taken back" in optimizer.last_step.status
        assert abs(float(model.w.detach()) + 1.5) <= 1e-12
        assert optimizer.last_step.next_damping > optimizer.last_step.damping
    else:
        optimizer.param_groups[0]["lr"] = 0.01
        optimizer.step(closure)
        scale.fill_(harder)
        before = float(model.w.detach())
        optimizer.step(closure)
        assert optimizer.last_step.accepted and optimizer.last_step.evaluations == 1
        newton = -(math.exp(before) - 1) / math.exp(before)
        assert abs(float(model.w.detach()) - before - 0.01 * newton) <= 1e-6
