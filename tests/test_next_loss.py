"""On fixed data the loss with which a step begins judges the step before."""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hessfree import CG, HessianFree, Identity, LevenbergMarquardt, mark_outputs
from tests.test_optimizer import closure_for, mlp, regression

FREE = LevenbergMarquardt(every=1, omega=0.5, minimum=1e-12, test="next_loss")


def test_the_next_loss_judges_the_step_before() -> None:
    x, y = regression(60)
    rule = LevenbergMarquardt(every=1, omega=0.5)
    dampings = []
    for free in (False, True):
        model = mlp()
        settings = {"damping_rule": dataclasses.replace(rule, test="next_loss") if free else rule, "weight_decay": 0.01}
        optimizer = HessianFree(model.parameters(), preconditioner=Identity(), solver=CG(max_iterations=5), **settings)
        reports = []
        for _ in range(6):
            optimizer.step(closure_for(optimizer, lambda: F.mse_loss(model(x), y)))  # noqa: B023
            reports.append(optimizer.last_step)
        # both evaluate the same loss at the same parameters, one of them a step later and without a replay
        dampings.append([r.damping for r in reports])
        assert sum(r.evaluations for r in reports) == (1 if free else 7)
    assert dampings[0] == dampings[1]
    assert len(set(dampings[0])) > 2


def test_a_step_is_judged_once_by_the_next_loss() -> None:
    model, (x, y) = mlp(torch.float32), regression(dtype=torch.float32)
    rule = LevenbergMarquardt(every=1, omega=0.5, test="next_loss")
    optimizer = HessianFree(model.parameters(), damping_rule=rule)
    optimizer.step(closure_for(optimizer, lambda: F.mse_loss(model(x), y)))
    optimizer.step(closure_for(optimizer, lambda: F.mse_loss(model(x), y) * math.nan))
    assert not optimizer.last_step.accepted
    after_rejection = optimizer.param_groups[0]["damping"]
    optimizer.step(closure_for(optimizer, lambda: F.mse_loss(model(x), y)))
    assert optimizer.last_step.damping == after_rejection


class Rosenbrock(nn.Module):
    """Residuals whose squares are Rosenbrock's valley: the full Gauss-Newton step from its usual start leaps out."""

    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.tensor([-1.2, 1.0], dtype=torch.float64))

    def loss(self) -> Tensor:
        x, y = self.x
        return mark_outputs(torch.stack([10 * (y - x**2), 1 - x])).square().sum()


def rosenbrock(**settings: Any) -> tuple[Rosenbrock, HessianFree, Callable[[], Tensor]]:
    model = Rosenbrock()
    arguments = {"damping": 1e-6, "solver": CG(2), "preconditioner": Identity(), "damping_rule": FREE}
    optimizer = HessianFree(model.parameters(), **(arguments | settings))
    return model, optimizer, closure_for(optimizer, model.loss)


@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
def test_a_step_that_led_uphill_is_cut_by_the_next(weight_decay: float) -> None:
    model, optimizer, closure = rosenbrock(weight_decay=weight_decay)

    def total() -> float:
        return float((model.loss() + 0.5 * weight_decay * model.x.square().sum()).detach())

    start, before = model.x.detach().clone(), total()
    optimizer.step(closure)
    assert optimizer.last_step.accepted
    step, rise = model.x.detach() - start, total() - before
    assert rise > 1000
    optimizer.step(closure)
    assert not optimizer.last_step.accepted
    assert "raised the loss from 24.2" in optimizer.last_step.status
    # the parabola through both losses with the slope at the first, and no shorter than a tenth
    slope = float(torch.tensor([-215.6, -88.0], dtype=torch.float64) @ step + weight_decay * start @ step)
    alpha = max(-slope / (2 * (rise - slope)), 0.1)
    assert (model.x.detach() - start - alpha * step).norm() <= 1e-12 * step.norm()
    assert optimizer.last_step.next_damping > 1e-6  # after so bad a prediction


def test_a_step_that_leads_uphill_even_when_cut_is_undone() -> None:
    x = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = HessianFree([x], damping=1e-6, solver=CG(2), preconditioner=Identity(), damping_rule=FREE)
    closure = closure_for(optimizer, lambda: mark_outputs(1 + x + 1e4 * x**4).square().sum())
    for _ in range(3):
        optimizer.step(closure)  # to -1, then to -0.1, and back
    assert "undone" in optimizer.last_step.status
    assert not abs(float(x.detach())) > 1e-12
    optimizer.step(closure)  # and on, with more damping
    assert optimizer.last_step.accepted
    assert optimizer.last_step.damping > 4e-6


def test_the_valley_is_followed_to_its_end() -> None:
    model, optimizer, closure = rosenbrock()
    kinds = []
    for _ in range(60):
        optimizer.step(closure)
        kinds.append(optimizer.last_step.accepted)
    assert kinds[:2] == [True, False]
    assert all(kinds[-3:])
    assert (model.x.detach() - 1).norm() <= 1e-6


def test_only_a_step_that_is_judged_is_cut() -> None:
    model, optimizer, closure = rosenbrock(damping_rule=dataclasses.replace(FREE, every=2), damping=1e3)
    optimizer.step(closure)  # judged, and short
    model.x.data.copy_(torch.tensor([-1.2, 1.0]))
    # a third of the way the loss rises by a factor of 2.4: one of three would be a leap, and taken back
    optimizer.param_groups[0] |= {"damping": 1e-6, "lr": 0.3}
    for _ in range(2):
        optimizer.step(closure)
        assert optimizer.last_step.accepted
    assert 50 < optimizer.last_step.loss < 3 * 24.2


def test_a_closure_that_draws_its_data_is_not_judged_by_the_next_loss() -> None:
    # the warning promises that the damping stays fixed, and that finite steps are taken
    model = mlp(torch.float32)
    x, y = regression(400, torch.float32)
    scales = iter([1.0, 1.0, 50.0, 1.0, 50.0, 1.0, 50.0])  # the first two go to the test of the closure
    batches = iter(list(zip(x.split(20), y.split(20), strict=True)))

    def loss() -> Tensor:
        a, b = next(batches)
        return next(scales) * F.mse_loss(model(a), b)

    optimizer = HessianFree(model.parameters(), damping_rule=FREE)
    closure = closure_for(optimizer, loss)
    with pytest.warns(UserWarning, match="Draw the batch before the closure"):
        optimizer.step(closure)
    for _ in range(4):
        optimizer.step(closure)
        assert optimizer.last_step.accepted
    assert optimizer.param_groups[0]["damping"] == 0.3


def test_what_waits_for_judgement_survives_a_checkpoint() -> None:
    model, optimizer, closure = rosenbrock()
    optimizer.step(closure)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed, other, again = rosenbrock()
    resumed.load_state_dict(saved["model"])
    other.load_state_dict(saved["optimizer"])
    for _ in range(4):
        optimizer.step(closure)
        other.step(again)
        assert torch.equal(model.x, resumed.x)
    assert not torch.equal(model.x, Rosenbrock().x)
