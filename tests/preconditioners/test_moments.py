"""K-FAC with input factors that the user knows."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hessfree.preconditioners.kronecker as kronecker
from hessfree import KFAC, HessianFree
from hessfree.preconditioners import InputMoments
from tests.preconditioners.oracles import sample_of

DOUBLE = torch.float64


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def net(bias: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4, bias=bias), nn.Tanh(), nn.Linear(4, 2)).double()


def mean_square(z: Tensor) -> Tensor:
    return F.mse_loss(z, torch.ones_like(z))


@pytest.mark.parametrize("by_weight", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_the_factor_is_the_given_one_whatever_the_batches(
    bias: bool, by_weight: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = net(bias), randn(100, 3, seed=1) + 1
    kfac = KFAC(input_moments={model[0].weight if by_weight else model[0]: InputMoments.of(data)})
    decomposed = []
    original = kronecker.eigh
    monkeypatch.setattr(kronecker, "eigh", lambda m: decomposed.append(m.shape) or original(m))
    a = torch.cat([data, torch.ones(100, 1)], 1) if bias else data
    state: dict[str, Any] = {}
    for k in range(3):
        state, warning = kfac.update(state, sample_of(model, randn(5, 3, seed=k), mean_square), k + 1)
        assert warning is None
        first, second = state["blocks"]
        assert (first["inner"] - a.T @ a / 100).norm() <= 1e-12 * first["inner"].norm()
        values = first["inner_basis"].T @ first["inner"] @ first["inner_basis"]
        assert (values - torch.diag(first["inner_values"])).norm() <= 1e-12 * values.norm()
    width = 4 if bias else 3
    assert decomposed.count((width, width)) == 1 + 3 * (width == 4)  # once, and S of the first layer [4, 4] each time
    plain: dict[str, Any] = {}
    for k in range(3):
        plain, _ = KFAC().update(plain, sample_of(model, randn(5, 3, seed=k), mean_square), k + 1)
    assert torch.equal(plain["blocks"][1]["inner"], second["inner"])  # other layers are averaged as ever
    assert not torch.equal(plain["blocks"][0]["inner"], first["inner"])


def test_a_wide_given_factor_is_low_rank_and_a_flat_tail() -> None:
    model, data = net(), randn(100, 3, seed=1)
    kfac = KFAC(input_moments={model[0]: InputMoments.of(data)}, wide=2, rank=2)
    state: dict[str, Any] = {}
    for k in range(3):
        state, _ = kfac.update(state, sample_of(model, randn(5, 3), mean_square), k + 1)
    block = state["blocks"][0]
    values = torch.linalg.eigvalsh(InputMoments.of(data).factor(True))
    assert (block["inner_values"] - values[2:]).norm() <= 1e-12
    assert abs(float(block["inner_flat"] - values[:2].mean())) <= 1e-12


def test_a_state_of_other_moments_is_not_kept() -> None:
    model, old, new = net(), InputMoments.of(randn(9, 3)), InputMoments.of(randn(9, 3, seed=4))
    sample = sample_of(model, randn(5, 3), mean_square)
    state, _ = KFAC(input_moments={model[0]: old}).update({}, sample, 1)
    state, _ = KFAC(input_moments={model[0]: new}).update(state, sample, 2)
    assert torch.equal(state["blocks"][0]["inner"], new.factor(True))


def test_a_checkpoint_holds_it_and_a_copy_of_both_finds_its_layer() -> None:
    model, x = net(), randn(30, 3)
    kfac = KFAC(input_moments={model[0]: InputMoments.of(x)})
    optimizer = HessianFree(model.parameters(), preconditioner=kfac)

    def steps(model: nn.Module, optimizer: HessianFree) -> Tensor:
        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = mean_square(model(x))
            loss.backward()
            return loss

        for _ in range(3):
            optimizer.step(closure)
        return torch.cat([p.detach().reshape(-1) for p in model.parameters()])

    steps(model, optimizer)
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    twin, other = copy.deepcopy((model, optimizer))
    third = copy.deepcopy(model)
    loaded = HessianFree(third.parameters(), preconditioner=KFAC(input_moments={third[0]: InputMoments.of(x)}))
    loaded.load_state_dict(torch.load(buffer, weights_only=True))
    expected = steps(model, optimizer)
    assert torch.equal(steps(twin, other), expected) and torch.equal(steps(third, loaded), expected)


def test_a_layer_of_another_model_is_refused() -> None:
    sample = sample_of(net(), randn(5, 3), mean_square)
    with pytest.raises(ValueError, match=r"shape \[4, 3\] that is not among"):
        KFAC(input_moments={net()[0]: InputMoments.of(randn(9, 3))}).update({}, sample, 1)


@pytest.mark.parametrize(
    ("mean", "second", "words"),
    [
        (torch.zeros(2), torch.eye(3), r"mean has shape \[2\] and second \[3, 3\]"),
        (torch.zeros(2, 1), torch.eye(2), r"must be \[n\] and \[n, n\]"),
        (torch.zeros(2), torch.tensor([[1.0, 0.5], [0.0, 1.0]]), "differs from its transpose by 0.5"),
        (torch.zeros(2), torch.tensor([[1.0, 2.0], [2.0, 1.0]]), "eigenvalue -1"),
        (torch.full((2,), 2.0), torch.eye(2), "not the covariance"),
        (torch.zeros(2), torch.full((2, 2), torch.nan), "not finite"),
        (torch.zeros(2, dtype=torch.long), torch.eye(2), "torch.int64"),
    ],
)
def test_moments_that_no_data_have(mean: Tensor, second: Tensor, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        InputMoments(mean, second)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        (nn.Conv1d(2, 3, 1), InputMoments(torch.zeros(2), torch.eye(2)), "Conv1d as a key"),
        (torch.zeros(3), InputMoments(torch.zeros(3), torch.eye(3)), r"shape \[3\] as a key"),
        (nn.Linear(2, 3), torch.eye(2), "Tensor as a value"),
        (nn.Linear(2, 3), InputMoments(torch.zeros(3), torch.eye(3)), "moments of 3 inputs .* takes 2; leave the bias"),
    ],
)
def test_settings_that_do_not_fit(key: Any, value: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        KFAC(input_moments={key: value})
