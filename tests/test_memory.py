"""What a step leaves for the next: used as the settings say, checkpointed bit for bit, dropped when it is void."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hessfree import (
    CG,
    KFAC,
    ConstantDamping,
    EisenstatWalker,
    HessianFree,
    Identity,
    LevenbergMarquardt,
    QuadraticModelMomentum,
    RootGradientNorm,
)
from tests.test_optimizer import closure_for, flat, mlp, regression, run_steps

NOTHING_REMEMBERED = {"residual replacement", "root of the norm"}
KFAC_STEP: dict[str, Any] = {
    "solver": CG(max_iterations=0),
    "preconditioner": KFAC(power=0.5),
    "damping_rule": ConstantDamping(),
    "gradient_ema": 0.9,
    "lr": 0.15,
    "max_step_norm": 1e-3**0.5,
    "step_norm": "preconditioner",
}
SETTINGS: dict[str, dict[str, Any]] = {
    "warm start": {"solver": CG(max_iterations=3, warm_start=0.95), "lr": 0.05},
    "Eisenstat-Walker": {"solver": CG(tolerance=EisenstatWalker(first=0.01)), "preconditioner": Identity()},
    "root of the norm": {"solver": CG(tolerance=RootGradientNorm())},
    "residual replacement": {"solver": CG(max_iterations=30, replace_residual=True)},
    "reused step length": {"solver": CG(max_iterations=1, every=4), "damping_rule": LevenbergMarquardt(every=2)},
    "three previous steps": {"momentum": QuadraticModelMomentum(history=3)},
    "mean of gradients": {"gradient_ema": 0.9},
    "K-FAC step": KFAC_STEP,
    "all that go together": {
        "solver": CG(tolerance=EisenstatWalker(), warm_start=0.9, replace_residual=True),
        "momentum": QuadraticModelMomentum(history=2),
        "gradient_ema": 0.5,
        "max_step_norm": 1.0,
        "step_norm": "preconditioner",
    },
}


@pytest.mark.parametrize("name", SETTINGS)
def test_six_steps_equal_three_and_three_through_a_checkpoint(name: str, tmp_path: Path) -> None:
    whole = mlp(torch.float32)
    optimizer = HessianFree(whole.parameters(), **SETTINGS[name])
    run_steps(optimizer, whole, range(6))

    half = mlp(torch.float32)
    optimizer = HessianFree(half.parameters(), **SETTINGS[name])
    run_steps(optimizer, half, range(3))
    torch.save({"model": half.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "checkpoint.pt")
    loaded = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    resumed = mlp(torch.float32, seed=9)
    resumed.load_state_dict(loaded["model"])
    optimizer = HessianFree(resumed.parameters(), **SETTINGS[name])
    optimizer.load_state_dict(loaded["optimizer"])
    run_steps(optimizer, resumed, range(3, 6))
    assert torch.equal(flat(whole.parameters()), flat(resumed.parameters()))
    assert optimizer.last_step is not None and optimizer.last_step.step == 6
    # what was remembered matters: without it the run is another
    forgetful = mlp(torch.float32, seed=9)
    forgetful.load_state_dict(loaded["model"])
    optimizer = HessianFree(forgetful.parameters(), **SETTINGS[name])
    state = loaded["optimizer"]
    state["state"]["hessfree"] |= {"solver": {}, "earlier_steps": (), "gradient_mean": None, "gradients": 0}
    optimizer.load_state_dict(state)
    run_steps(optimizer, forgetful, range(3, 6))
    assert torch.equal(flat(whole.parameters()), flat(forgetful.parameters())) == (name in NOTHING_REMEMBERED)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_parameter_may_be_frozen_and_freed_again(name: str) -> None:
    model = mlp(torch.float32)
    optimizer = HessianFree(model.parameters(), **SETTINGS[name])
    for i, free in enumerate((True, True, False, False, True, True)):
        model[0].weight.requires_grad_(free)
        run_steps(optimizer, model, range(i, i + 1))
        assert optimizer.last_step is not None and optimizer.last_step.accepted


def memory_of(optimizer: HessianFree) -> dict[str, Any]:
    return optimizer.state["hessfree"]  # type: ignore[index]


def test_the_start_is_the_solution_and_neither_the_step_nor_the_combined_direction() -> None:
    model, (x, y) = mlp(), regression()
    optimizer = HessianFree(
        model.parameters(), lr=0.5, solver=CG(max_iterations=2, warm_start=0.95), damping_rule=ConstantDamping(),
        preconditioner=Identity(), momentum=QuadraticModelMomentum(),
    )  # fmt: skip
    closure = closure_for(optimizer, lambda: F.mse_loss(model(x), y))
    optimizer.step(closure)
    first = memory_of(optimizer)["solver"]["solution"]
    # after CG's own iterations alone the model has its minimum at full length
    torch.testing.assert_close(0.5 * first, memory_of(optimizer)["previous_step"], rtol=1e-8, atol=1e-12)
    optimizer.step(closure)
    second = memory_of(optimizer)["solver"]["solution"]
    assert float((0.5 * second - memory_of(optimizer)["previous_step"]).norm()) >= 1e-3 * float(second.norm())


def test_after_a_rejected_step_the_solver_starts_afresh_and_the_mean_goes_on() -> None:
    model, (x, y) = mlp(torch.float32), regression(dtype=torch.float32)
    optimizer = HessianFree(
        model.parameters(), solver=CG(max_iterations=1, every=10), preconditioner=Identity(), gradient_ema=0.5,
        damping_rule=LevenbergMarquardt(every=1), damping=1e-2, lr=0.2, momentum=QuadraticModelMomentum(history=3),
    )  # fmt: skip
    closure = closure_for(optimizer, lambda: F.mse_loss(model(x), y))
    for _ in range(4):
        optimizer.step(closure)
        assert optimizer.last_step is not None and optimizer.last_step.accepted
    assert optimizer.last_step.iterations == 0
    known = dict(memory_of(optimizer))
    assert len(known["earlier_steps"]) == 2 and known["solver"]["reused"] == 3
    optimizer.param_groups[0]["lr"] = 1e4
    optimizer.step(closure)
    assert "the loss rose" in optimizer.last_step.status
    left = memory_of(optimizer)
    assert dict(left["solver"]) == {} and left["gradients"] == known["gradients"] + 1
    assert left["previous_step"] is known["previous_step"]
    assert all(a is b for a, b in zip(left["earlier_steps"], known["earlier_steps"], strict=True))
    optimizer.param_groups[0]["lr"] = 0.2
    broken = x.clone()
    broken[0, 0] = math.nan
    optimizer.step(closure_for(optimizer, lambda: F.mse_loss(model(broken), y)))
    assert not optimizer.last_step.accepted
    assert memory_of(optimizer)["gradient_mean"] is left["gradient_mean"]
    optimizer.step(closure)
    assert optimizer.last_step.iterations == 1
    for _ in range(12):  # until λ and the mean fit again
        optimizer.step(closure)
    assert optimizer.last_step.accepted and optimizer.last_step.loss < F.mse_loss(mlp(torch.float32)(x), y)


def test_forcing_terms_see_the_gradients_of_the_steps() -> None:
    model, (x, y) = mlp(), regression()
    rule = EisenstatWalker(first=0.3)
    optimizer = HessianFree(model.parameters(), solver=CG(tolerance=rule), preconditioner=Identity())
    last: tuple[float | None, float | None] = (None, None)
    for _ in range(5):
        optimizer.step(closure_for(optimizer, lambda: F.mse_loss(model(x), y)))
        report = optimizer.last_step
        assert report is not None and report.accepted
        eta = rule.tolerance(report.gradient_norm, *last)
        assert report.residual <= eta < min(report.residuals[:-1])
        last = (report.gradient_norm, eta)


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_the_mean_of_gradients_is_that_of_adam(decay: float, weight_decay: float) -> None:
    model, twin, (x, y) = mlp(), mlp(), regression()
    optimizer = HessianFree(
        model.parameters(), lr=0.1, solver=CG(max_iterations=0), preconditioner=Identity(), gradient_ema=decay,
        damping_rule=ConstantDamping(), weight_decay=weight_decay,
    )  # fmt: skip
    total = torch.zeros_like(flat(twin.parameters()))
    for t in range(1, 7):
        optimizer.step(closure_for(optimizer, lambda: F.mse_loss(model(x), y)))
        params = list(twin.parameters())
        gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(F.mse_loss(twin(x), y), params)])
        total = decay * total + (1 - decay) * gradient
        theta = flat(params)
        theta = theta - 0.1 * (total / (1 - decay**t) + weight_decay * theta)
        nn.utils.vector_to_parameters(theta, params)
        torch.testing.assert_close(flat(model.parameters()), theta, rtol=1e-12, atol=1e-13)
    assert (memory_of(optimizer)["gradient_mean"] is None) == (decay == 0)


@pytest.mark.parametrize("solver", [CG(max_iterations=0), CG(max_iterations=3)], ids=["alone", "cg"])
@pytest.mark.parametrize("batches", [1, 3])
def test_the_prediction_is_of_the_gradient_and_not_of_its_mean(solver: CG, batches: int) -> None:
    torch.manual_seed(0)
    model = nn.Linear(5, 2).double()
    x, y = torch.randn(30, 5).double(), torch.randn(30, 2).double()
    optimizer = HessianFree(
        model.parameters(), lr=0.3, damping=0.1, weight_decay=0.01, gradient_ema=0.8, solver=solver,
        damping_rule=LevenbergMarquardt(every=1), preconditioner=Identity(),
    )  # fmt: skip
    for _ in range(5):
        chunks = list(zip(x.chunk(batches), y.chunk(batches), strict=True))
        optimizer.zero_grad()
        for a, b in chunks[:-1]:
            (F.mse_loss(model(a), b) / batches).backward()

        def closure() -> Tensor:
            loss = F.mse_loss(model(chunks[-1][0]), chunks[-1][1]) / batches  # noqa: B023
            loss.backward()
            return loss

        optimizer.step(closure)
        assert optimizer.last_step is not None
        assert abs(optimizer.last_step.reduction_ratio - 1) <= 1e-6  # the model is exact here, uphill too


@pytest.mark.parametrize("lr", [1.0, 0.15])
@pytest.mark.parametrize("power", [1.0, 0.5])
def test_the_length_of_a_step_in_the_norm_of_the_preconditioner(power: float, lr: float) -> None:
    model, (x, y) = mlp(), regression()
    limit = 1e-2
    optimizer = HessianFree(model.parameters(), **(KFAC_STEP | {
        "preconditioner": KFAC(power=power), "lr": lr, "max_step_norm": limit, "gradient_ema": 0.7,
    }))  # fmt: skip
    closure = closure_for(optimizer, lambda: F.mse_loss(model(x), y))
    for _ in range(3):
        before = flat(model.parameters())
        optimizer.step(closure)
        s = flat(model.parameters()) - before
        learned = memory_of(optimizer)["preconditioner"]
        parameters = optimizer._trainable()
        inverse = optimizer.settings.preconditioner.inverse(learned, parameters, 1.0, [0.3] * len(parameters.params))
        assert inverse is not None
        dense = torch.stack([inverse(e) for e in torch.eye(len(s), dtype=s.dtype)], 1)
        length = (s @ torch.linalg.solve(dense, s)).sqrt()
        assert abs(float(length) - limit) <= 1e-9 * limit
    assert optimizer.last_step is not None
    assert abs(optimizer.last_step.step_norm - float(s.norm())) <= 1e-12


def test_a_short_step_is_left_alone() -> None:
    results = []
    for limit in (None, 1e3):
        model, (x, y) = mlp(), regression()
        optimizer = HessianFree(model.parameters(), **(KFAC_STEP | {"max_step_norm": limit}))
        optimizer.step(closure_for(optimizer, lambda: F.mse_loss(model(x), y)))  # noqa: B023
        results.append(flat(model.parameters()))
    assert torch.equal(*results)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gradient_ema": 1.0}, "gradient_ema=1.0 is the decay of a mean of gradients: choose 0 <= it < 1"),
        ({"gradient_ema": -0.1}, "gradient_ema=-0.1"),
        ({"gradient_ema": math.nan}, "gradient_ema=nan"),
        ({"step_norm": "kl"}, "step_norm='kl' must be 'euclidean', 'curvature' or 'preconditioner'"),
        ({"max_step_norm": 0.0}, "max_step_norm=0.0 must be positive"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HessianFree(mlp().parameters(), **settings)
