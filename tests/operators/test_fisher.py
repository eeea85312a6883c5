"""Sampled Fisher matrices against the dense matrices of an independent oracle, in float64."""

from __future__ import annotations

import itertools

import numpy
import pytest
import torch
from scipy.sparse.linalg import eigsh
from torch import Tensor
from torch.nn import functional as F

from hessfree import GaussNewton, MonteCarloFisher
from hessfree.operators.outer_products import OuterProducts
from tests.architectures import classes, mlp, randn
from tests.networks import PROBLEMS, make
from tests.oracle import error, truth
from tests.problem import Problem

UNSUITED = {"indefinite", "named_outputs", "ranking", "weight_penalty", "bare_parameter"}  # no root, or more than z
SUITED = [name for name in PROBLEMS if make(name).loss_fn is not None and name not in UNSUITED]


def sampled(problem: Problem, **options: int) -> MonteCarloFisher:
    return MonteCarloFisher.from_loss(problem.model, problem.loss_fn, problem.inputs, problem.targets, **options)


def outer(operator: OuterProducts, jacobian: Tensor) -> Tensor:
    """The matrix that the cotangents stand for, one sample at a time."""
    total = torch.zeros(operator.size, operator.size, dtype=torch.float64)
    space = operator.linearization.space
    sample_of = torch.cat([
        torch.arange(operator.samples).repeat_interleave(n // operator.samples) for n in space.numels
    ])
    for u in operator.cotangents:
        for n in range(operator.samples):
            row = (u * (sample_of == n)) @ jacobian
            total += torch.outer(row, row)
    return total


@pytest.mark.parametrize("name", SUITED)
def test_matrix_products_and_diagonal(name: str) -> None:
    problem = make(name)
    true = truth(problem)
    operator = sampled(problem, samples=2, seed=3)
    dense = outer(operator, true.jacobian)
    v, block = randn(operator.size, seed=5), randn(operator.size, 3, seed=6)
    assert operator.samples == problem.outputs()[0].shape[0]
    assert error(operator.to_dense(), dense) <= 1e-10
    assert error(operator.diagonal(), dense.diagonal()) <= 1e-10
    assert error(operator.trace(), dense.trace()) <= 1e-10
    assert error(operator @ v, dense @ v) <= 1e-10
    assert error(operator @ block, dense @ block) <= 1e-10
    assert error(operator.quadratic_form(block.T), block.T @ dense @ block) <= 1e-10
    values = torch.linalg.eigvalsh(operator.to_dense())
    assert float(values[0]) >= -1e-12 * float(values[-1])
    rank = min(operator.size, 2 * operator.samples)
    assert int((values > 1e-10 * values[-1]).sum()) <= rank


@pytest.mark.parametrize("name", ["mean_squared_error", "weighted_cross_entropy", "bce_with_logits", "conv_batchnorm"])
def test_the_mean_over_all_signs_is_the_gauss_newton_matrix(name: str) -> None:
    problem = make(name)
    true = truth(problem)
    exact = GaussNewton.from_loss(problem.model, problem.loss_fn, problem.inputs, problem.targets)
    form, space = exact.root_form("test"), exact.linearization.space
    rows, width = space.shapes[0]
    # every pattern of signs at the outputs of a sample, for all samples at once: they do not meet
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=width)), dtype=torch.float64)
    cotangents = torch.stack([form.root(e.repeat(rows)) for e in signs]) / len(signs) ** 0.5
    operator = MonteCarloFisher(exact.linearization, cotangents, exact.parameters)
    assert error(operator.to_dense(), true.gauss_newton) <= 1e-10


@pytest.mark.parametrize("name", ["weighted_cross_entropy", "nested_outputs", "segmentation"])
def test_draws_are_unbiased(name: str) -> None:
    problem = make(name)
    true = truth(problem).gauss_newton
    errors = []
    for samples in (20, 2000):
        torch.manual_seed(0)  # a network that draws noise draws the oracle's
        errors.append(error(sampled(problem, samples=samples).to_dense(), true))
    assert errors[1] <= 0.05
    assert errors[0] > 3 * errors[1]


def test_a_large_softmax_with_ignored_targets() -> None:
    model, x, y = mlp(3, 70), randn(4, 3), torch.tensor([0, 5, 69, -100])
    true = GaussNewton.from_loss(model, F.cross_entropy, x, y).to_dense()
    assert error(MonteCarloFisher.from_loss(model, F.cross_entropy, x, y, samples=4000).to_dense(), true) <= 0.2


def test_of_a_model_alone() -> None:
    problem = make("mean_squared_error")
    jacobian = truth(problem).jacobian
    operator = MonteCarloFisher.from_model(problem.model, problem.inputs, samples=2000)
    assert torch.equal(operator.cotangents.abs() * 2000**0.5, torch.ones_like(operator.cotangents))
    assert error(operator.to_dense(), jacobian.T @ jacobian) <= 0.05


def test_the_seed_decides() -> None:
    problem = make("weighted_cross_entropy")
    first, same, other = (sampled(problem, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.cotangents, same.cotangents)
    assert not torch.equal(first.cotangents, other.cotangents)
    state = torch.get_rng_state()
    sampled(problem, seed=1)
    assert torch.equal(torch.get_rng_state(), state)


def test_streaming() -> None:
    problem = make("weighted_cross_entropy")
    whole, parts = sampled(problem, samples=3, seed=4), sampled(problem, samples=3, seed=4, microbatch=2)
    assert error(parts.to_dense(), whole.to_dense()) <= 1e-10
    v = randn(whole.size, seed=5)
    assert error(parts @ v, whole @ v) <= 1e-10


def test_in_chunks_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    operator = sampled(make("nested_outputs"), samples=2)
    dense, diagonal = operator.to_dense(), operator.diagonal()
    monkeypatch.setattr("hessfree.operators.rows.CHUNK", 3 * operator.size)
    assert error(operator.to_dense(), dense) <= 1e-13
    assert error(operator.diagonal(), diagonal) <= 1e-13


def test_largest_eigenvalues_by_scipy() -> None:
    operator = sampled(make("conv_batchnorm"), samples=5)
    values = eigsh(operator.to_scipy(), k=6, v0=numpy.ones(operator.size), return_eigenvectors=False)
    true = torch.linalg.eigvalsh(operator.to_dense())[-6:]
    assert error(torch.from_numpy(numpy.sort(values)), true) <= 1e-10


def test_a_float32_model() -> None:
    model = mlp(3, 4, 2).float()
    x, y = randn(5, 3).float(), randn(5, 2, seed=3).float()
    single = MonteCarloFisher.from_loss(model, F.mse_loss, x, y)
    assert single.to_dense().dtype == (single @ torch.ones(single.size)).dtype == torch.float32
    double = MonteCarloFisher.from_loss(model.double(), F.mse_loss, x.double(), y.double())
    assert error(single.to_dense().double(), double.to_dense()) <= 1e-6


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("ranking", "needs a square root .* neither diagonal nor"),
        ("indefinite", "needs a square root .* negative ones make up"),
        ("weight_penalty", "the loss uses parameters directly"),
    ],
)
def test_losses_that_cannot_be_sampled(name: str, match: str) -> None:
    problem = make(name)
    loss_fn = problem.loss_fn or (lambda z, _: problem.ell((z,)))
    inputs = randn(4, 3) if problem.inputs is None else problem.inputs
    with pytest.raises(ValueError, match=match):
        MonteCarloFisher.from_loss(problem.model, loss_fn, inputs, problem.targets)


def test_errors() -> None:
    model, x, y = mlp(3, 4, 3), randn(5, 3), classes(5, high=3)
    for samples in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="must be a positive integer"):
            MonteCarloFisher.from_loss(model, F.cross_entropy, x, y, samples=samples)
        with pytest.raises(ValueError, match="must be a positive integer"):
            MonteCarloFisher.from_model(model, x, samples=samples)
    exact = GaussNewton.from_model(model, x)
    for shape in ((15,), (1, 14), (1, 5, 3)):
        with pytest.raises(ValueError, match="do not fit outputs of 15 numbers"):
            MonteCarloFisher(exact.linearization, torch.ones(shape), exact.parameters)
