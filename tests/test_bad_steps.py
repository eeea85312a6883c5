"""Bad input ends in an error that says what, why and how; bad numbers in a rejected, reported step; nothing is lost."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks

from hessfree import CG, Armijo, HessianFree, Identity, LevenbergMarquardt
from tests.test_optimizer import closure_for, flat, mlp, regression


def optimizer_and_closure(**settings: Any) -> tuple[nn.Module, HessianFree, Callable[[], Tensor]]:
    model, (x, y) = mlp(torch.float32), regression(dtype=torch.float32)
    optimizer = HessianFree(model.parameters(), **settings)
    return model, optimizer, closure_for(optimizer, lambda: F.mse_loss(model(x), y))


@pytest.mark.parametrize("name", ["lr", "damping", "weight_decay"])
@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_numbers_out_of_range(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name}={value}"):
        HessianFree(mlp().parameters(), **{name: value})
    _, optimizer, closure = optimizer_and_closure()
    optimizer.param_groups[0][name] = value  # a scheduler may do so later
    with pytest.raises(ValueError, match=f"{name}={value}"):
        optimizer.step(closure)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"solver": "cg"}, r"solver='cg' .*hessfree.CG"),
        ({"solver": CG}, r"solver=<class .*pass an object"),
        ({"preconditioner": None}, "preconditioner=None"),
        ({"damping_rule": 0.3}, "damping_rule=0.3"),
        ({"line_search": "armijo"}, "line_search='armijo'"),
        ({"momentum": 0.9}, "momentum=0.9"),
        ({"curvature_batch": 0}, "curvature_batch=0"),
        ({"curvature_batch": 1.5}, "curvature_batch=1.5"),
        ({"curvature_batch": math.nan}, "curvature_batch=nan"),
        ({"linearization": "jax"}, "linearization='jax'"),
        ({"microbatch": 0}, "microbatch=0"),
        ({"microbatch": 0.5}, "microbatch=0.5"),
        ({"compile": 1}, "compile=1"),
        ({"compile": True, "linearization": "graph"}, "compile=True compiles traces.*'graph'"),
        ({"seed": 0.5}, "seed=0.5"),
        ({"model": "net"}, "model='net'"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HessianFree(mlp().parameters(), **settings)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ([], "empty parameter list"),
        ([torch.zeros(2)], "no parameter that requires grad"),
        ([nn.Parameter(torch.zeros(2, dtype=torch.complex64))], "complex64.*view_as_real"),
        ([nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2, device="meta"))], "several devices"),
    ],
)
def test_parameters_that_cannot_be_served(params: list[Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HessianFree(params)


def unchanged(model: nn.Module, optimizer: HessianFree, closure: Any, error: type[Exception], match: str) -> None:
    """A step that raises leaves parameters, λ, report, random state and hooks as they were."""
    before, damping, report = flat(model.parameters()), optimizer.param_groups[0]["damping"], optimizer.last_step
    random_state, memory = torch.get_rng_state(), dict(optimizer.state.get("hessfree", {}))
    with pytest.raises(error, match=match):
        optimizer.step(closure)
    assert torch.equal(before, flat(model.parameters()))
    assert optimizer.param_groups[0]["damping"] == damping
    assert optimizer.last_step is report
    assert torch.equal(random_state, torch.get_rng_state())
    assert dict(optimizer.state.get("hessfree", {})) == memory
    assert not module_hooks._global_forward_hooks
    assert not module_hooks._global_forward_pre_hooks


def test_step_without_closure() -> None:
    model, optimizer, _ = optimizer_and_closure()
    unchanged(model, optimizer, None, RuntimeError, "without a closure.*GradScaler")


def test_grad_scaler() -> None:
    model, optimizer, _ = optimizer_and_closure()
    x, y = regression(dtype=torch.float32)
    scaler = torch.amp.GradScaler("cpu", enabled=True)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        scaler.scale(loss).backward()
        return loss

    unchanged(model, optimizer, closure, RuntimeError, "GradScaler")
    scaler.scale(F.mse_loss(model(x), y)).backward()
    with pytest.raises(RuntimeError, match="GradScaler"):
        scaler.step(optimizer)


def test_loss_of_another_model() -> None:
    model, optimizer, _ = optimizer_and_closure()
    other, (x, y) = mlp(torch.float32, seed=5), regression(dtype=torch.float32)
    unchanged(model, optimizer, closure_for(optimizer, lambda: F.mse_loss(other(x), y)), RuntimeError, "another model")


def test_empty_batch() -> None:
    model, optimizer, _ = optimizer_and_closure()
    closure = closure_for(optimizer, lambda: model(torch.zeros(0, 3)).square().sum())
    unchanged(model, optimizer, closure, ValueError, r"batch is empty.*\(0, 2\)")


def test_curvature_batch_without_batch_dimension() -> None:
    model, optimizer, _ = optimizer_and_closure(curvature_batch=1)
    x, y = regression(dtype=torch.float32)

    class Summed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = model

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x).mean(0)

    net = Summed()
    closure = closure_for(optimizer, lambda: (net(x) - y.mean(0)).square().sum())
    unchanged(model, optimizer, closure, ValueError, "dimension 0.*curvature_batch=None")


def test_error_in_the_first_and_in_a_later_call_of_the_closure() -> None:
    model, optimizer, closure = optimizer_and_closure(damping_rule=LevenbergMarquardt(every=1))
    optimizer.step(closure)
    calls = []

    def failing(at: int) -> Callable[[], Tensor]:
        def inner() -> Tensor:
            calls.append(1)
            torch.rand(3)
            if len(calls) == at:
                raise KeyError("the user's own error")
            return closure()

        return inner

    unchanged(model, optimizer, failing(1), KeyError, "own error")
    calls.clear()
    unchanged(model, optimizer, failing(2), KeyError, "own error")  # during the replay at trial parameters
    optimizer.step(closure)
    assert optimizer.last_step.accepted


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_batch_that_is_not_finite_is_rejected_and_training_goes_on(bad: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 2))
    x, y = regression(dtype=torch.float32)
    optimizer = HessianFree(model.parameters(), damping_rule=LevenbergMarquardt(every=1))
    good = closure_for(optimizer, lambda: F.mse_loss(model(x), y))
    for _ in range(3):
        optimizer.step(good)
    before, damping = flat(model.parameters()), optimizer.param_groups[0]["damping"]
    buffers = [b.clone() for b in model.buffers()]
    memory = optimizer.state["hessfree"]
    broken = x.clone()
    broken[0, 0] = bad
    optimizer.step(closure_for(optimizer, lambda: F.mse_loss(model(broken), y)))
    report = optimizer.last_step
    assert not report.accepted
    assert "rejected: the loss is nan" in report.status
    assert torch.equal(before, flat(model.parameters()))
    assert optimizer.param_groups[0]["damping"] > damping
    assert report.next_damping == optimizer.param_groups[0]["damping"]
    for a, b in zip(buffers, model.buffers(), strict=True):
        assert torch.equal(a, b)
    after = optimizer.state["hessfree"]
    assert after["preconditioner"] is memory["preconditioner"]
    assert after["previous_step"] is memory["previous_step"]
    optimizer.step(good)
    assert optimizer.last_step.accepted
    assert optimizer.last_step.loss_after < optimizer.last_step.loss


class _BadGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * math.nan


def test_a_gradient_that_is_not_finite_is_rejected() -> None:
    model, optimizer, _ = optimizer_and_closure()
    x, y = regression(dtype=torch.float32)
    before = flat(model.parameters())
    optimizer.step(closure_for(optimizer, lambda: F.mse_loss(_BadGradient.apply(model(x)), y)))
    assert optimizer.last_step.status == "rejected: the gradient is not finite"
    assert torch.equal(before, flat(model.parameters()))


class _BadCurvature(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return _BadGradient.apply(g)


def test_a_product_that_is_not_finite_is_rejected() -> None:
    x, y = regression(dtype=torch.float32)
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp(torch.float32)

        def forward(self, x: Tensor) -> Tensor:
            return _BadCurvature.apply(self.inner(x))

    model = Net()
    optimizer = HessianFree(model.parameters(), preconditioner=Identity(), linearization="graph")
    before = flat(model.parameters())
    optimizer.step(closure_for(optimizer, lambda: F.mse_loss(model(x), y)))
    assert not optimizer.last_step.accepted
    assert "not finite" in optimizer.last_step.status
    assert torch.equal(before, flat(model.parameters()))


def test_a_step_that_makes_the_loss_worse_is_rejected_and_damping_grows() -> None:
    model, optimizer, closure = optimizer_and_closure(lr=50.0, damping=1e-3, damping_rule=LevenbergMarquardt(every=1))
    before = flat(model.parameters())
    optimizer.step(closure)
    assert "the loss rose from" in optimizer.last_step.status
    assert torch.equal(before, flat(model.parameters()))
    assert optimizer.param_groups[0]["damping"] > 1e-3
    assert optimizer.last_step.step_norm == 0


def test_armijo_shortens_a_step_that_is_too_long() -> None:
    _, optimizer, closure = optimizer_and_closure(lr=8.0, damping=1e-3, line_search=Armijo())
    optimizer.step(closure)
    assert optimizer.last_step.accepted
    assert optimizer.last_step.step_length < 1
    assert optimizer.last_step.loss_after < optimizer.last_step.loss


def test_a_closure_that_draws_data_is_told_so_once() -> None:
    model = mlp(torch.float32)
    x, y = regression(400, torch.float32)
    batches = iter(list(zip(x.split(20), y.split(20), strict=True)))

    def loss() -> Tensor:
        a, b = next(batches)
        return F.mse_loss(model(a), b)

    optimizer = HessianFree(model.parameters(), line_search=Armijo())
    closure = closure_for(optimizer, loss)
    with pytest.warns(UserWarning, match="Draw the batch before the closure"):
        optimizer.step(closure)
    damping = optimizer.param_groups[0]["damping"]
    for _ in range(6):
        optimizer.step(closure)
    assert optimizer.param_groups[0]["damping"] == damping
    assert optimizer.last_step.evaluations == 0
    assert optimizer.last_step.accepted


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer, closure = optimizer_and_closure()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    unchanged(model, optimizer, closure, RuntimeError, "default process group has 2")


def test_a_forward_pass_outside_the_closure_is_told_so_once() -> None:
    model, (x, y) = mlp(torch.float32), regression(dtype=torch.float32)
    optimizer = HessianFree(model.parameters())
    for i in range(3):
        out = model(x)
        closure = closure_for(optimizer, lambda: F.mse_loss(out, y))  # noqa: B023
        if i == 0:
            with pytest.warns(UserWarning) as warned:
                optimizer.step(closure)
            assert any("Move the forward pass into the closure" in str(w.message) for w in warned)
        else:
            optimizer.step(closure)
    assert optimizer.param_groups[0]["damping"] == 0.3
