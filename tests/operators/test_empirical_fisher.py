"""The empirical Fisher matrix against gradients of one sample at a time, in float64."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hessfree import EmpiricalFisher, GaussNewton, MonteCarloFisher
from hessfree.linearization import ChunkedLinearization
from hessfree.losses import OutputHessian
from hessfree.operators.independence import check_independent
from hessfree.operators.known_cuts import trace_in_parts
from hessfree.vectors import ParameterVector
from tests.architectures import ConvNet, classes, mlp, randn
from tests.networks import PROBLEMS, make
from tests.oracle import error, truth
from tests.problem import Problem

# networks and losses that mix samples, a weight penalty, and a network that has more outputs than samples
UNSUITED = {"conv_batchnorm", "ranking", "weight_penalty", "bare_parameter", "checkpointed_attention"}
SUITED = [name for name in PROBLEMS if make(name).loss_fn is not None and name not in UNSUITED]


def empirical(problem: Problem, **options: Any) -> EmpiricalFisher:
    return EmpiricalFisher.from_loss(problem.model, problem.loss_fn, problem.inputs, problem.targets, **options)


def second_moment(problem: Problem, terms: float | None = None) -> Tensor:
    """T Σ_n g_n g_nᵀ, from the oracle's Jacobian and the gradient of its loss in z."""
    jacobian = truth(problem).jacobian
    values = [t.detach() for t in problem.outputs()]
    z = [t.requires_grad_() for t in values]
    gradients = torch.autograd.grad(problem.ell(tuple(z)), z)
    count = z[0].shape[0]
    sample_of = torch.cat([torch.arange(count).repeat_interleave(t.numel() // count) for t in z])
    u = torch.cat([g.flatten() for g in gradients])
    rows = torch.stack([(u * (sample_of == n)) @ jacobian for n in range(count)])
    torch.manual_seed(0)
    return (count if terms is None else terms) * rows.T @ rows


@pytest.mark.parametrize("name", SUITED)
def test_matrix_products_and_diagonal(name: str) -> None:
    problem = make(name)
    true = second_moment(problem)
    assert float(true.norm()) > 0
    torch.manual_seed(0)
    operator = empirical(problem)
    v = randn(operator.size, seed=5)
    assert error(operator.to_dense(), true) <= 1e-10
    assert error(operator.diagonal(), true.diagonal()) <= 1e-10
    assert error(operator.trace(), true.trace()) <= 1e-10
    assert error(operator @ v, true @ v) <= 1e-10
    assert error(operator.quadratic_form(v[None]), (v @ true @ v)[None, None]) <= 1e-10
    assert float(torch.linalg.eigvalsh(operator.to_dense())[0]) >= -1e-12 * float(true.norm())


@pytest.mark.parametrize("name", ["mean_squared_error", "weighted_cross_entropy", "segmentation"])
@pytest.mark.parametrize("microbatch", [1, 2, 100])
def test_part_by_part(name: str, microbatch: int) -> None:
    problem = make(name)
    true = second_moment(problem)
    operator = empirical(problem, microbatch=microbatch)
    assert isinstance(operator.linearization, ChunkedLinearization) is (microbatch < operator.samples)
    v = randn(operator.size, seed=5)
    assert error(operator.to_dense(), true) <= 1e-10
    assert error(operator.diagonal(), true.diagonal()) <= 1e-10
    assert error(operator @ v, true @ v) <= 1e-10


@pytest.mark.parametrize("operator", [EmpiricalFisher, MonteCarloFisher])
def test_compiled(operator: type[EmpiricalFisher | MonteCarloFisher], monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[Any] = []

    def compiler(function: Any, **options: Any) -> Any:
        compiled.append(function)
        return lambda *tensors: function(*tensors)

    monkeypatch.setattr(torch, "compile", compiler)
    problem = make("weighted_cross_entropy")
    arguments = problem.model, problem.loss_fn, problem.inputs, problem.targets
    plain = operator.from_loss(*arguments).to_dense()
    assert not compiled
    assert error(operator.from_loss(*arguments, compile=True).to_dense(), plain) <= 1e-12
    assert compiled
    with pytest.raises(ValueError, match="compile"):
        operator.from_loss(*arguments, compile=True, linearization="graph")


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_sample_by_sample(reduction: str) -> None:
    """For a mean over samples: the mean of outer products of the gradients that one sample alone gives."""
    model, x, y = mlp(3, 4, 3), randn(6, 3), classes(6, high=3)
    total = torch.zeros(31, 31, dtype=torch.float64)
    for n in range(6):
        found = torch.autograd.grad(F.cross_entropy(model(x[n : n + 1]), y[n : n + 1]), list(model.parameters()))
        gradient = torch.cat([g.flatten() for g in found])
        total += torch.outer(gradient, gradient) / (6 if reduction == "mean" else 1)
    found = EmpiricalFisher.from_loss(model, nn.CrossEntropyLoss(reduction=reduction), x, y)
    assert error(found.to_dense(), total) <= 1e-12


def test_terms() -> None:
    problem = make("mean_squared_error")
    assert error(empirical(problem, terms=7.5).to_dense(), second_moment(problem, 7.5)) <= 1e-12
    summed = EmpiricalFisher.from_loss(problem.model, nn.MSELoss(reduction="sum"), problem.inputs, problem.targets)
    # ten numbers, of which the mean is over all: (10)² / 5 more
    assert error(summed.to_dense(), 20 * empirical(problem).to_dense()) <= 1e-12
    for terms in (0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="must be positive and finite"):
            empirical(problem, terms=terms)


def test_the_world_afterwards_is_as_after_one_call() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()
    model[2].eval()
    x, y = randn(6, 3), randn(6, 2, seed=3)
    torch.manual_seed(3)
    model(x)
    state = torch.get_rng_state()
    buffers = [b.clone() for b in model.buffers()]
    torch.manual_seed(3)
    operator = EmpiricalFisher.from_loss(model, F.mse_loss, x, y)
    operator @ randn(operator.size)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(buffers, model.buffers(), strict=True))


class OverBatch(nn.Module):
    """Attends from each sample to all, or to earlier ones alone."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.causal, self.layer = causal, nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x)
        scores = h @ h.T
        if self.causal:
            scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), float("-inf"))
        return scores.softmax(1) @ h


def test_batch_normalisation_is_named() -> None:
    model, x, y = ConvNet().double(), randn(6, 1, 4, 4), classes(6, high=3)
    before = [b.clone() for b in model.buffers()]
    with pytest.raises(ValueError, match=r"ConvNet mixes .* \(BatchNorm2d 'norm' in train mode\); call model.eval"):
        EmpiricalFisher.from_loss(model, F.cross_entropy, x, y)
    assert not torch.equal(before[0], next(model.buffers()))  # as after one call
    model.eval()
    assert EmpiricalFisher.from_loss(model, F.cross_entropy, x, y).samples == 6


@pytest.mark.parametrize("causal", [False, True])
def test_any_other_mixing_is_found(causal: bool) -> None:
    with pytest.raises(ValueError, match="OverBatch mixes the samples of a batch; call"):
        EmpiricalFisher.from_loss(OverBatch(causal).double(), F.mse_loss, randn(6, 3), randn(6, 3))


def test_mixing_is_found_under_autocast_too() -> None:
    model, x, y = OverBatch(causal=True), randn(6, 3).float(), randn(6, 3).float()
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="OverBatch mixes the samples"):
        EmpiricalFisher.from_loss(model, F.mse_loss, x, y)


@pytest.mark.parametrize("mixes", [False, True])
def test_arguments_on_another_device_than_the_parameters(mixes: bool) -> None:
    """Tensors on the CPU can be indexed by no tensor elsewhere; the device here is one that every machine has."""
    model, x, y = OverBatch(causal=True).double() if mixes else mlp(3, 4, 3), randn(6, 3), randn(6, 3)
    parameters = ParameterVector(list(model.parameters()))
    recorded, cut, _ = trace_in_parts(model, F.mse_loss, x, y, parameters, None)
    hessian = OutputHessian.of(cut)
    parameters.device = torch.device("meta")
    said = pytest.raises(ValueError, match="OverBatch mixes the samples") if mixes else contextlib.nullcontext()
    with said:
        check_independent(recorded, cut, hessian, parameters)


@pytest.mark.parametrize("microbatch", [None, 4])
def test_samples_that_are_mixed_in_pairs(microbatch: int | None) -> None:
    """The parts of the batch have other outputs nowhere, nor have its halves."""

    class Pairs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.layer(x)
            return h + h.view(-1, 2, 2).flip(1).view(-1, 2).tanh()

    model, x, y = Pairs().double(), randn(8, 3), randn(8, 2)
    true = GaussNewton.from_loss(model, F.mse_loss, x, y).to_dense()
    assert error(GaussNewton.from_loss(model, F.mse_loss, x, y, microbatch=4).to_dense(), true) <= 1e-12
    with pytest.raises(ValueError, match="Pairs mixes the samples of a batch"):
        EmpiricalFisher.from_loss(model, F.mse_loss, x, y, microbatch=microbatch)

    def loss_fn(z: Tensor, y: Tensor) -> Tensor:
        return (z - y).view(-1, 2, 2).sum(1).square().mean()

    with pytest.raises(ValueError, match="couples the outputs of different samples"):
        EmpiricalFisher.from_loss(mlp(3, 2), loss_fn, x, y, microbatch=microbatch)


def test_a_recurrent_network_with_time_first() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.GRU(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.rnn(x)[0]

    with pytest.raises(ValueError, match="Net mixes"):
        EmpiricalFisher.from_loss(Net().double(), F.mse_loss, randn(5, 4, 3), randn(5, 4, 2))


def test_a_single_sample_and_numbers_that_are_not_finite() -> None:
    model, y = mlp(3, 4, 2), randn(1, 2)
    x = randn(1, 3)
    operator = EmpiricalFisher.from_loss(model, F.mse_loss, x, y)
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(F.mse_loss(model(x), y), list(model.parameters()))])
    assert error(operator.to_dense(), torch.outer(gradient, gradient)) <= 1e-12
    x = torch.cat([x, torch.full_like(x, float("nan"))])
    broken = EmpiricalFisher.from_loss(model, F.mse_loss, x, y.repeat(2, 1))
    assert not bool(torch.isfinite(broken @ torch.ones(broken.size)).all())


def test_errors() -> None:
    ranking, penalty = make("ranking"), make("weight_penalty")
    with pytest.raises(ValueError, match="couples the outputs of different samples"):
        empirical(ranking)
    with pytest.raises(ValueError, match="that part belongs to no sample"):
        EmpiricalFisher.from_loss(penalty.model, lambda z, _: penalty.ell((z,)), randn(4, 3), None)
    model, x, y = mlp(3, 4, 2), randn(5, 3), randn(5, 2)
    with pytest.raises(ValueError, match="linear in the outputs"):
        EmpiricalFisher.from_loss(model, F.l1_loss, x, y)
    with pytest.raises(ValueError, match="linearization='best'"):
        EmpiricalFisher.from_loss(model, F.mse_loss, x, y, linearization="best")
    flat = nn.Sequential(*mlp(3, 4, 2), nn.Flatten(0))
    with pytest.raises(ValueError, match=r"10 samples along .* the inputs of Sequential have shapes \[\(5, 3\)\]"):
        EmpiricalFisher.from_loss(flat, F.mse_loss, x, y.flatten())

    class Number(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x).sum()

    with pytest.raises(ValueError, match="share no dimension 0 for samples"):
        EmpiricalFisher.from_loss(Number().double(), lambda z, _: z.square(), x, None)
