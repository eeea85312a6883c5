"""Jacobi, the empirical Fisher diagonal and Nyström against dense matrices."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hessfree import EmpiricalFisherDiagonal, GaussNewton, HessianFree, Jacobi, Nystrom
from hessfree.preconditioners import Sample
from tests.preconditioners.oracles import sample_of

DOUBLE = torch.float64


def problem() -> tuple[nn.Module, Tensor, Tensor, Sample]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 4)).double()
    x = torch.randn(10, 3, dtype=DOUBLE)
    target = torch.arange(10) % 4
    return model, x, target, sample_of(model, x, lambda z: F.cross_entropy(z, target))


def reseeded(sample: Sample, seed: int) -> Sample:
    return Sample(**(vars(sample) | {"seed": seed}))


def dense_of(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    return GaussNewton.from_loss(model, F.cross_entropy, x, target).to_dense()


def test_jacobi_is_the_diagonal() -> None:
    model, x, target, sample = problem()
    expected = dense_of(model, x, target).diagonal()
    state, warning = Jacobi(method="exact").update({}, sample, 1)
    assert warning is None
    assert (state["diagonal"] - expected).norm() <= 1e-10 * expected.norm()
    draws = torch.stack([Jacobi().update({}, reseeded(sample, i), 1)[0]["diagonal"] for i in range(3000)])
    error, spread = draws.mean(0) - expected, draws.std(0) / math.sqrt(len(draws))
    assert bool((error.abs() <= 5 * spread + 1e-12).all())


def test_the_empirical_fisher_diagonal_is_the_sum_of_squared_sample_gradients() -> None:
    model, x, target, sample = problem()
    expected = torch.zeros(sample.parameters.size, dtype=DOUBLE)
    for n in range(len(x)):
        loss = F.cross_entropy(model(x[n : n + 1]), target[n : n + 1])
        gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(model.parameters()))])
        expected += gradient.square() / len(x)
    learn = EmpiricalFisherDiagonal().update
    draws = torch.stack([learn({}, reseeded(sample, i), 1)[0]["diagonal"] for i in range(3000)])
    error, spread = draws.mean(0) - expected, draws.std(0) / math.sqrt(len(draws))
    assert bool((error.abs() <= 5 * spread + 1e-12).all())


@pytest.mark.parametrize("preconditioner", [Jacobi(power=1.0), EmpiricalFisherDiagonal()])
def test_the_inverse_is_a_power_of_the_damped_diagonal(preconditioner: Any) -> None:
    *_, sample = problem()
    state, _ = preconditioner.update({}, sample, 1)
    shifts = [0.1 * (i + 1) for i in range(len(sample.parameters.params))]
    apply = preconditioner.inverse(state, sample.parameters, 2.0, shifts)
    r = torch.randn(sample.parameters.size, dtype=DOUBLE)
    numels = sample.parameters.numels
    shift = torch.cat([torch.full((n,), s, dtype=DOUBLE) for n, s in zip(numels, shifts, strict=True)])
    expected = r / (2.0 * state["diagonal"] + shift) ** preconditioner.power
    assert (apply(r) - expected).norm() <= 1e-12 * expected.norm()


def test_estimates_are_averaged_and_states_left_alone() -> None:
    *_, sample = problem()
    jacobi = Jacobi(decay=0.9)
    first, _ = jacobi.update({}, reseeded(sample, 1), 1)
    kept = first["diagonal"].clone()
    second, _ = jacobi.update(first, reseeded(sample, 2), 2)
    alone, _ = jacobi.update({}, reseeded(sample, 2), 2)
    assert torch.equal(first["diagonal"], kept)
    assert (second["diagonal"] - (kept + alone["diagonal"]) / 2).norm() <= 1e-12
    assert jacobi.due({}, 1)
    assert not jacobi.due({"updates": 3, "step": 4}, 8)
    assert jacobi.due({"updates": 3, "step": 4}, 9)


def test_nystrom_of_full_rank_is_the_matrix() -> None:
    model, x, target, sample = problem()
    dense = dense_of(model, x, target)
    state, warning = Nystrom(rank=len(dense)).update({}, sample, 1)
    assert warning is None
    apply = Nystrom().inverse(state, sample.parameters, 3.0, [0.2] * len(sample.parameters.params))
    r = torch.randn(len(dense), dtype=DOUBLE)
    expected = torch.linalg.solve(3.0 * dense + 0.2 * torch.eye(len(dense), dtype=DOUBLE), r)
    assert (apply(r) - expected).norm() <= 1e-6 * expected.norm()


def test_nystrom_of_low_rank_keeps_the_largest_eigenvalues() -> None:
    model, x, target, sample = problem()
    dense = dense_of(model, x, target)
    state, _ = Nystrom(rank=15).update({}, sample, 1)
    largest = torch.linalg.eigvalsh(dense).flip(0)[:3]
    assert bool((state["values"][:3] <= largest * (1 + 1e-9)).all())
    assert bool((state["values"][:3] >= 0.8 * largest).all())
    basis = state["basis"]
    assert (basis.T @ basis - torch.eye(15, dtype=DOUBLE)).norm() <= 1e-10


EACH = [Jacobi(), Jacobi(method="exact"), EmpiricalFisherDiagonal(), Nystrom(rank=8)]


@pytest.mark.parametrize("preconditioner", EACH)
def test_each_trains_and_resumes(preconditioner: Any, tmp_path) -> None:
    ends = []
    for resume in (False, True):
        model, x, target, _ = problem()
        optimizer = HessianFree(model.parameters(), preconditioner=preconditioner)

        def closure(model=model, x=x, target=target) -> Tensor:
            optimizer.zero_grad()  # noqa: B023
            loss = F.cross_entropy(model(x), target)
            loss.backward()
            return loss

        first = float(closure().detach())
        for i in range(8):
            if resume and i == 4:
                torch.save(optimizer.state_dict(), tmp_path / "o.pt")
                optimizer = HessianFree(model.parameters(), preconditioner=preconditioner)
                optimizer.load_state_dict(torch.load(tmp_path / "o.pt", weights_only=True))
            optimizer.step(closure)
        assert optimizer.last_step.loss < first
        ends.append(torch.cat([p.detach().reshape(-1) for p in model.parameters()]))
    assert torch.equal(*ends)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (Jacobi, {"method": "guess"}),
        (Jacobi, {"decay": 1.0}),
        (EmpiricalFisherDiagonal, {"power": 0.0}),
        (Jacobi, {"update_every": 0}),
        (Jacobi, {"damping_scale": math.nan}),
        (Nystrom, {"rank": 0}),
    ],
)
def test_settings_out_of_range(kind: Any, settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        kind(**settings)
