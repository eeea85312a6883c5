"""The exact Hessian against a dense one."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hessfree import GaussNewton, Hessian
from tests.architectures import mlp, randn
from tests.networks import make
from tests.oracle import at, error, flat
from tests.problem import Problem


def dense_hessian(problem: Problem) -> torch.Tensor:
    theta = flat([p.detach() for p in problem.model.parameters()])
    return torch.autograd.functional.hessian(lambda t: at(problem, t, problem.forward), theta)


@pytest.mark.parametrize("name", ["mean_squared_error", "conv_batchnorm", "tied_tokens", "weight_penalty", "dropout"])
def test_products_matrix_and_diagonal(name: str) -> None:
    problem = make(name)
    true = dense_hessian(problem)
    torch.manual_seed(0)
    operator = Hessian.from_loss(problem.model, problem.loss_fn, problem.inputs, problem.targets)
    v = randn(len(true), seed=5)
    assert error(operator @ v, true @ v) <= 1e-11
    assert error(operator.to_dense(), true) <= 1e-11
    assert error(operator.diagonal(), true.diagonal()) <= 1e-11


def test_of_an_l1_loss_is_what_the_network_bends() -> None:
    problem = make("mean_squared_error")
    problem.forward = lambda: F.l1_loss(problem.model(problem.inputs), problem.targets)
    true = dense_hessian(problem)
    operator = Hessian.from_loss(problem.model, F.l1_loss, problem.inputs, problem.targets)
    assert error(operator.to_dense(), true) <= 1e-11
    assert float(true.norm()) > 0


def test_equals_gauss_newton_where_the_network_is_linear() -> None:
    model, x, y = nn.Linear(3, 2).double(), randn(5, 3), randn(5, 2)
    left = Hessian.from_loss(model, F.mse_loss, x, y).to_dense()
    assert error(left, GaussNewton.from_loss(model, F.mse_loss, x, y).to_dense()) <= 1e-14


def test_unused_parameters_have_rows_of_zeros() -> None:
    problem = make("partly_frozen")
    operator = Hessian.from_loss(problem.model, problem.loss_fn, problem.inputs, problem.targets)
    dense, ours = operator.to_dense(), slice(2, 12)  # bare [2], used [10], unused [6]
    assert float(dense[ours, ours].norm()) > 0
    dense[ours, ours] = 0
    assert float(dense.norm()) == 0


def test_errors() -> None:
    model, x, y = mlp(3, 4, 2), randn(5, 3), randn(5, 2)
    with pytest.raises(ValueError, match="not a scalar"):
        Hessian.from_loss(model, lambda z, t: z - t, x, y)
    with pytest.raises(ValueError, match="does not depend on the parameters"):
        Hessian.from_loss(model, lambda z, t: F.mse_loss(z.detach(), t), x, y)
    other = torch.ones((), requires_grad=True)
    with pytest.raises(ValueError, match="does not depend on the parameters of Sequential"):
        Hessian.from_loss(model, lambda z, t: other * 2, x, y)
