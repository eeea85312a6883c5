"""Woodbury: the exact damped step where it sees all samples, a positive definite inverse everywhere."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hessfree import CG, KFAC, ConstantDamping, GaussNewton, HessianFree, QuadraticModelMomentum
from hessfree.preconditioners import Woodbury
from tests.preconditioners.oracles import sample_of
from tests.solvers.oracles import DenseOperator

DOUBLE = torch.float64


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


class Conv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.last = nn.Conv2d(2, 4, 3, groups=2), nn.GroupNorm(2, 4), nn.Linear(4, 3)
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.last((self.norm(self.conv(x)) * self.scale[:, None, None]).tanh().mean((2, 3)))


NETS = {
    "mlp": (lambda: nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2)), (12, 3)),
    "tokens": (lambda: nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)), (9, 2, 3)),
    "conv": (Conv, (8, 2, 5, 5)),
    "wide outputs": (lambda: nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 9)), (12, 3)),
}


def dense_map(apply, size: int) -> Tensor:
    return torch.stack([apply(row) for row in torch.eye(size, dtype=DOUBLE)], 1)


def build(name: str, weight: float, samples: int, scale: float = 1.0):
    torch.manual_seed(0)
    make, shape = NETS[name]
    model, x = make().double(), randn(*shape)
    target = torch.randn(shape[0], model(x).shape[1], generator=torch.Generator().manual_seed(1)).double()
    sample = sample_of(model, x, lambda z: F.mse_loss(z, target))
    shifts = [0.3] * len(sample.parameters.params)
    sample = type(sample)(**(vars(sample) | {"shifts": shifts, "scale": scale}))
    woodbury = Woodbury(samples=samples, weight=weight, damping_scale=1.0, kfac=KFAC(factors="exact"))
    state, warning = woodbury.update({}, sample, 1)
    assert warning is None
    apply = woodbury.inverse(state, sample.parameters, scale, shifts)
    return model, x, target, sample, dense_map(apply, sample.parameters.size)


@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize("name", ["mlp", "tokens", "conv"])
def test_with_all_samples_it_is_the_exact_damped_inverse(name: str, scale: float) -> None:
    model, x, target, sample, found = build(name, 0.1, samples=100, scale=scale)
    dense = GaussNewton.from_loss(model, F.mse_loss, x, target).to_dense()
    expected = torch.linalg.inv(scale * dense + 0.3 * torch.eye(len(dense), dtype=DOUBLE))
    assert (found - expected).norm() <= 1e-10 * expected.norm()


@pytest.mark.parametrize("name", NETS)
def test_the_inverse_is_symmetric_and_positive_definite(name: str) -> None:
    *_, found = build(name, 0.1, samples=5)
    assert (found - found.T).norm() <= 1e-12 * found.norm()
    assert torch.linalg.eigvalsh(found).min() > 0


def test_it_lies_between_kfac_and_the_truth() -> None:
    model, x, target, sample, found = build("mlp", 0.01, samples=12)
    dense = GaussNewton.from_loss(model, F.mse_loss, x, target).to_dense()
    damped = dense + 0.3 * torch.eye(len(dense), dtype=DOUBLE)
    b = randn(len(dense), seed=3)
    plain = CG(max_iterations=200, tolerance=1e-10)

    operator = DenseOperator(damped)
    with_it = plain.solve(operator, b, 0.0, lambda r: found @ r)
    without = plain.solve(operator, b, 0.0)
    expected = torch.linalg.solve(damped, b)
    assert (with_it.value - expected).norm() <= 1e-8 * expected.norm()
    assert with_it.iterations < without.iterations


def test_one_step_with_all_samples_is_the_damped_gauss_newton_step() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2)).double()
    x, y = randn(20, 3), randn(20, 2, seed=1)
    params = list(model.parameters())
    gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(F.mse_loss(model(x), y), params)])
    dense = GaussNewton.from_loss(model, F.mse_loss, x, y).to_dense() + 0.1 * torch.eye(len(gradient), dtype=DOUBLE)
    before = torch.cat([p.detach().reshape(-1) for p in params])
    optimizer = HessianFree(
        params, damping=0.1, damping_rule=ConstantDamping(), solver=CG(max_iterations=1),
        preconditioner=Woodbury(samples=20, damping_scale=1.0),
    )  # fmt: skip

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        return loss

    optimizer.step(closure)
    after = torch.cat([p.detach().reshape(-1) for p in params])
    expected = before - torch.linalg.solve(dense, gradient)
    assert (after - expected).norm() <= 1e-10 * expected.norm()


def test_settings_and_state(tmp_path) -> None:
    for settings in ({"samples": 0}, {"weight": -1.0}, {"update_every": 0.5}, {"damping_scale": float("nan")}):
        with pytest.raises(ValueError, match=next(iter(settings))):
            Woodbury(**settings)
    torch.manual_seed(0)
    results = []
    for resume in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2))
        x, y = randn(20, 3).float(), randn(20, 2).float()

        def make(model=model) -> HessianFree:
            return HessianFree(
                model.parameters(), preconditioner=Woodbury(samples=8), solver=CG(max_iterations=0),
                momentum=QuadraticModelMomentum(),
            )  # fmt: skip

        optimizer = make()

        def closure(model=model, x=x, y=y) -> Tensor:
            optimizer.zero_grad()  # noqa: B023
            loss = F.mse_loss(model(x), y)
            loss.backward()
            return loss

        for i in range(8):
            if resume and i == 5:
                torch.save(optimizer.state_dict(), tmp_path / "o.pt")
                optimizer = make()
                optimizer.load_state_dict(torch.load(tmp_path / "o.pt", weights_only=True))
            optimizer.step(closure)
        results.append(torch.cat([p.detach().reshape(-1) for p in model.parameters()]))
        assert "Woodbury: 16 rows" in optimizer.last_step.preconditioner
    assert torch.equal(*results)


def test_singular_and_indefinite_factors_in_single_precision() -> None:
    """Dead inputs make A singular, and rounding makes it indefinite by more than a tiny λ: still a positive inverse."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 30), nn.Tanh(), nn.Linear(30, 2))
    x = torch.randn(64, 2) @ torch.randn(2, 40) * 30  # rank 2
    for samples in (8, 64):
        sample = sample_of(model, x, lambda z: F.mse_loss(z, torch.ones_like(z)))
        for shift in (0.0, 1e-12):
            sample = type(sample)(**(vars(sample) | {"shifts": [shift] * 4}))
            state, _ = Woodbury(samples=samples).update({}, sample, 1)
            apply = Woodbury(samples=samples).inverse(state, sample.parameters, 1.0, [shift] * 4)
            assert apply is not None
            r = torch.randn(sample.parameters.size, generator=torch.Generator().manual_seed(1))
            found = apply(r)
            assert bool(torch.isfinite(found).all()) and float(found @ r) > 0
