"""The optimizer as a user calls it: exact steps, presets, groups, schedulers, checkpoints."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hessfree
from hessfree import (
    CG,
    ConstantDamping,
    DenseCholesky,
    FullStep,
    GaussNewton,
    HessianFree,
    Identity,
    LevenbergMarquardt,
    QuadraticModelMomentum,
)

PINNED = {
    "solver": CG(max_iterations=2000, tolerance=1e-12),
    "preconditioner": Identity(),
    "damping_rule": ConstantDamping(),
    "line_search": FullStep(),
    "momentum": None,
    "curvature_batch": None,
}


def mlp(dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 2)).to(dtype)


def regression(n: int = 40, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(n, 3, generator=g, dtype=dtype)
    return x, torch.stack([(x[:, 0] * x[:, 1]).sin(), x[:, 2].cos()], 1)


def closure_for(optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor]) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    return closure


def flat(params) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in params])


@pytest.mark.parametrize("solver", [CG(max_iterations=2000, tolerance=1e-12), DenseCholesky()], ids=["cg", "dense"])
@pytest.mark.parametrize("loss_fn", ["mse", "cross_entropy", "huber"])
def test_step_is_the_damped_gauss_newton_step(solver, loss_fn: str) -> None:
    model, (x, y) = mlp(), regression()
    target = (y[:, 0] > 0).long() if loss_fn == "cross_entropy" else y
    loss = {"mse": F.mse_loss, "cross_entropy": F.cross_entropy, "huber": F.huber_loss}[loss_fn]
    params = list(model.parameters())
    gradient = torch.cat([t.reshape(-1) for t in torch.autograd.grad(loss(model(x), target), params)])
    dense = GaussNewton.from_loss(model, loss, x, target).to_dense()
    damping = 0.05
    expected = flat(params) - torch.linalg.solve(dense + damping * torch.eye(len(dense), dtype=dense.dtype), gradient)
    optimizer = HessianFree(params, damping=damping, **(PINNED | {"solver": solver}))
    optimizer.step(closure_for(optimizer, lambda: loss(model(x), target)))
    assert (flat(params) - expected).norm() <= 1e-8 * expected.norm()


def test_groups_have_their_own_rate_damping_and_decay() -> None:
    model, (x, y) = mlp(), regression()
    first, last = list(model[:3].parameters()), list(model[3:].parameters())
    params = [*first, *last]
    gradient = torch.cat([t.reshape(-1) for t in torch.autograd.grad(F.mse_loss(model(x), y), params)])
    dense = GaussNewton.from_loss(model, F.mse_loss, x, y).to_dense()
    n = sum(p.numel() for p in first)

    def spread(a: float, b: float) -> Tensor:
        return torch.cat([torch.full((n,), a), torch.full((len(dense) - n,), b)]).double()

    theta, decay = flat(params), spread(0.01, 0.0)
    rhs = -(gradient + decay * theta)
    expected = theta + spread(1.0, 0.5) * torch.linalg.solve(dense + torch.diag(spread(0.1, 0.3) + decay), rhs)
    groups = [
        {"params": first, "damping": 0.1, "weight_decay": 0.01},
        {"params": last, "lr": 0.5, "damping": 0.3},
    ]
    optimizer = HessianFree(groups, **(PINNED | {"damping_rule": LevenbergMarquardt(every=1)}))
    optimizer.step(closure_for(optimizer, lambda: F.mse_loss(model(x), y)))
    assert (flat(params) - expected).norm() <= 1e-8 * expected.norm()
    report = optimizer.last_step
    before = F.mse_loss(mlp()(x), y) + 0.5 * (decay * theta**2).sum()
    after = F.mse_loss(model(x), y) + 0.5 * (decay * flat(params) ** 2).sum()
    s = expected - theta
    predicted = gradient @ s + (decay * theta) @ s + 0.5 * s @ ((dense + torch.diag(decay)) @ s)
    assert abs(report.reduction_ratio - float((after - before).detach() / predicted)) <= 1e-6


@pytest.mark.parametrize("wd", [0.0, 0.1])
@pytest.mark.parametrize("clip", [None, 0.01])
@pytest.mark.parametrize("batches", [1, 4])
@pytest.mark.parametrize("momentum", [None, QuadraticModelMomentum()], ids=["plain", "momentum"])
def test_ratio_is_one_where_the_model_is_exact(wd: float, clip: float | None, batches: int, momentum) -> None:
    torch.manual_seed(0)
    model = nn.Linear(5, 2).double()
    x, y = torch.randn(32, 5).double(), torch.randn(32, 2).double()
    optimizer = HessianFree(
        model.parameters(), lr=0.5, damping=0.1, weight_decay=wd, momentum=momentum,
        damping_rule=LevenbergMarquardt(every=1), solver=CG(max_iterations=3), preconditioner=Identity(),
    )  # fmt: skip
    for _ in range(4):
        chunks = list(zip(x.chunk(batches), y.chunk(batches), strict=True))
        optimizer.zero_grad()
        for a, b in chunks[:-1]:  # as a trainer does: all but the last micro-batch outside of step()
            (F.mse_loss(model(a), b) / batches).backward()

        def closure() -> Tensor:
            a, b = chunks[-1]  # noqa: B023
            loss = F.mse_loss(model(a), b) / batches
            loss.backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            return loss

        optimizer.step(closure)
        assert optimizer.last_step.accepted
        assert abs(optimizer.last_step.reduction_ratio - 1) <= 1e-6


def test_accumulation_takes_the_step_of_the_whole_batch() -> None:
    x, y = regression(48)
    x, y = x[:12].repeat(4, 1), y[:12].repeat(4, 1)  # equal micro-batches: their curvatures are equal too
    results = []
    for batches in (1, 4):
        model = mlp()
        optimizer = HessianFree(model.parameters(), **PINNED)
        chunks = list(zip(x.chunk(batches), y.chunk(batches), strict=True))
        for _ in range(3):
            optimizer.zero_grad()
            for a, b in chunks[:-1]:
                (F.mse_loss(model(a), b) / batches).backward()

            def closure() -> Tensor:
                loss = F.mse_loss(model(chunks[-1][0]), chunks[-1][1]) / batches  # noqa: B023
                loss.backward()
                return loss

            optimizer.step(closure)
        results.append(flat(model.parameters()))
    assert (results[0] - results[1]).norm() <= 1e-9 * results[0].norm()


def test_hessianfree_trains_better_than_adam_at_equal_steps() -> None:
    x, y = regression(200, torch.float32)
    final = {}
    for name in ("hessfree", "adam"):
        model = mlp(torch.float32)
        optimizer: torch.optim.Optimizer
        if name == "hessfree":
            optimizer = HessianFree(model.parameters())
        else:
            optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        for _ in range(60):
            optimizer.step(closure_for(optimizer, lambda: F.mse_loss(model(x), y)))  # noqa: B023
        final[name] = float(F.mse_loss(model(x), y).detach())
    assert final["hessfree"] <= 0.2 * final["adam"]


def run_steps(optimizer: HessianFree, model: nn.Module, steps: range) -> None:
    for i in steps:
        g = torch.Generator().manual_seed(100 + i)
        x = torch.randn(64, 3, generator=g)
        y = torch.stack([x[:, 0].sin(), x[:, 1] * x[:, 2]], 1) + 0.1 * torch.randn(64, 2, generator=g)
        optimizer.step(closure_for(optimizer, lambda: F.mse_loss(model(x), y)))  # noqa: B023


@pytest.mark.parametrize("preset", [HessianFree, HessianFree.stochastic, HessianFree.full_batch])
def test_six_steps_equal_three_and_three_through_a_checkpoint(preset, tmp_path: Path) -> None:
    whole = mlp(torch.float32)
    optimizer = preset(whole.parameters())
    run_steps(optimizer, whole, range(6))

    half = mlp(torch.float32)
    optimizer = preset(half.parameters())
    run_steps(optimizer, half, range(3))
    torch.save({"model": half.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "checkpoint.pt")
    loaded = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    resumed = mlp(torch.float32, seed=9)
    resumed.load_state_dict(loaded["model"])
    optimizer = preset(resumed.parameters())
    optimizer.load_state_dict(loaded["optimizer"])
    run_steps(optimizer, resumed, range(3, 6))
    assert torch.equal(flat(whole.parameters()), flat(resumed.parameters()))
    assert optimizer.last_step.step == 6


def test_a_deep_copy_goes_on_alike() -> None:
    model = mlp(torch.float32)
    optimizer = HessianFree(model.parameters())
    run_steps(optimizer, model, range(2))
    twin, twin_optimizer = copy.deepcopy((model, optimizer))
    run_steps(optimizer, model, range(2, 4))
    run_steps(twin_optimizer, twin, range(2, 4))
    assert torch.equal(flat(model.parameters()), flat(twin.parameters()))


@pytest.mark.parametrize("name", ["stochastic", "full_batch"])
def test_presets_are_plain_arguments(name: str) -> None:
    preset = getattr(HessianFree, name)
    model = mlp(torch.float32)
    optimizer = preset(model.parameters(), lr=0.5, seed=4, solver=CG(max_iterations=2))
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert optimizer.settings.seed == 4
    assert optimizer.settings.solver.max_iterations == 2
    for _ in range(3):  # one batch: the recipe for fixed data counts on it
        run_steps(optimizer, model, range(1))
    assert optimizer.last_step.accepted


def test_accepts_what_adam_accepts() -> None:
    model = mlp(torch.float32)
    for params in (
        model.parameters(),
        list(model.parameters()),
        model.named_parameters(),
        [{"params": model[0].parameters()}, {"params": model[2:].parameters(), "lr": 0.1}],
    ):
        optimizer = HessianFree(params)
        run_steps(optimizer, model, range(1))
        assert optimizer.last_step.accepted


def test_schedulers_drive_the_step_length() -> None:
    model = mlp(torch.float32)
    optimizer = HessianFree(model.parameters())
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=4)
    for i in range(4):
        run_steps(optimizer, model, range(i, i + 1))
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] <= 1e-12
    before = flat(model.parameters())
    run_steps(optimizer, model, range(4, 5))
    assert torch.equal(before, flat(model.parameters()))


def test_frozen_and_unused_parameters_do_not_move() -> None:
    model = mlp()
    unused = nn.Parameter(torch.ones(3).double())
    model[0].weight.requires_grad_(False)
    x, y = regression()
    frozen = model[0].weight.clone()
    optimizer = HessianFree([*model.parameters(), unused])
    for _ in range(2):
        optimizer.step(closure_for(optimizer, lambda: F.mse_loss(model(x), y)))
    assert torch.equal(frozen, model[0].weight)
    assert torch.equal(unused, torch.ones(3).double())
    model[0].weight.requires_grad_(True)  # unfrozen later: it takes part from the next step on
    optimizer.step(closure_for(optimizer, lambda: F.mse_loss(model(x), y)))
    assert not torch.equal(frozen, model[0].weight)


def test_a_part_of_the_batch_for_curvature_is_exact_on_that_part() -> None:
    x, y = regression(40)
    model = mlp()
    params = list(model.parameters())
    gradient = torch.cat([t.reshape(-1) for t in torch.autograd.grad(F.mse_loss(model(x), y), params)])
    dense = GaussNewton.from_loss(model, F.mse_loss, x[:10], y[:10]).to_dense()
    expected = flat(params) - torch.linalg.solve(dense + 0.1 * torch.eye(len(dense), dtype=dense.dtype), gradient)
    optimizer = HessianFree(params, damping=0.1, **(PINNED | {"curvature_batch": 10}))
    optimizer.step(closure_for(optimizer, lambda: F.mse_loss(model(x), y)))
    assert optimizer.last_step.curvature_samples == 10
    assert (flat(params) - expected).norm() <= 1e-8 * expected.norm()


TWO_DROPOUTS = nn.Sequential(nn.Dropout(0.5), nn.Dropout(0.5))  # of one alone, the first rows would be the same


@pytest.mark.parametrize("layer", [TWO_DROPOUTS, nn.BatchNorm1d(8)], ids=["dropout", "batchnorm"])
def test_a_part_of_the_batch_is_refused_where_it_is_another_network(layer: nn.Module) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), layer, nn.Tanh(), nn.Linear(8, 2)).double()
    x, y = regression(40)
    optimizer = HessianFree(model.parameters(), curvature_batch=10)
    closure = closure_for(optimizer, lambda: F.mse_loss(model(x), y))
    with pytest.warns(UserWarning, match="gives other outputs on a part of the batch"):
        optimizer.step(closure)
    assert optimizer.last_step.curvature_samples == 40
    optimizer.step(closure)  # warned once


@pytest.mark.parametrize("norm", ["euclidean", "curvature"])
def test_steps_are_no_longer_than_allowed(norm: str) -> None:
    model, (x, y) = mlp(), regression()
    dense = GaussNewton.from_loss(model, F.mse_loss, x, y).to_dense()
    before = flat(model.parameters())
    optimizer = HessianFree(model.parameters(), damping=1e-3, max_step_norm=0.01, step_norm=norm)
    optimizer.step(closure_for(optimizer, lambda: F.mse_loss(model(x), y)))
    s = flat(model.parameters()) - before
    length = s.norm() if norm == "euclidean" else (s @ dense @ s).sqrt()
    assert abs(float(length) - 0.01) <= 1e-9
    assert abs(optimizer.last_step.reduction_ratio - 1) <= 0.05


def test_version_and_face() -> None:
    assert hessfree.__version__
    assert math.isnan(hessfree.StepReport(step=1, accepted=True, status="", loss=1.0).reduction_ratio)
    assert HessianFree(mlp().parameters()).last_step is None
