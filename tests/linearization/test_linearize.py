"""The public `linearize(model, inputs)`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hessfree
from hessfree.linearization import LinearizationError
from tests.architectures import mlp, randn
from tests.networks import PROBLEMS, make
from tests.oracle import error, truth

WITH_INPUTS = [name for name in PROBLEMS if make(name).inputs is not None]


class TwoArguments(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(4, 3, 2)

    def forward(self, x: Tensor, *, t: Tensor) -> Tensor:
        return self.net(torch.cat([x, t], 1))


@pytest.mark.parametrize("name", sorted(set(WITH_INPUTS) - {"nested_outputs", "logits_and_loss"}))
def test_products_of_a_model(name: str) -> None:
    problem = make(name)
    true = truth(problem)
    j = hessfree.linearize(problem.model, problem.inputs)
    rows, columns = true.jacobian.shape
    v, u = randn(columns, seed=8), randn(rows, seed=9)
    assert error(j.outputs, true.outputs) <= 1e-13
    assert error(j.jvp(v), true.jacobian @ v) <= 1e-12
    assert error(j.vjp(u), true.jacobian.T @ u) <= 1e-12


def test_every_differentiable_output_counts_in_the_order_of_the_tree() -> None:
    problem = make("nested_outputs")
    j = hessfree.linearize(problem.model, problem.inputs)
    assert [tuple(shape) for shape in j.space.shapes] == [(4, 3), (4, 2), (4, 2), (4, 2)]


def test_inputs_as_a_tuple_and_by_keyword() -> None:
    model = TwoArguments()
    x, t, v = randn(4, 3), randn(4, 1), randn(23)
    by_keyword = hessfree.linearize(model, {"x": x, "t": t}).jvp(v)
    (tensor,) = (hessfree.linearize(model.net, (torch.cat([x, t], 1),)).jvp(v),)
    assert error(by_keyword, tensor) <= 1e-14


def test_no_grad_around_does_not_matter() -> None:
    model, x, v = mlp(3, 4, 2), randn(5, 3), randn(26)
    expected = hessfree.linearize(model, x).jvp(v)
    with torch.no_grad():
        assert torch.equal(hessfree.linearize(model, x).jvp(v), expected)


def test_frozen_parameters_are_left_out() -> None:
    model = mlp(3, 4, 2)
    model[0].requires_grad_(False)
    assert hessfree.linearize(model, randn(5, 3)).vjp(randn(10)).shape == (10,)


@pytest.mark.parametrize(
    ("model", "backend", "error_type", "match"),
    [
        (mlp(3, 4, 2), "fast", ValueError, "linearization='fast' is no back end"),
        (mlp(3, 4, 2).requires_grad_(False), "auto", ValueError, "no parameter that requires grad"),
        (nn.Tanh(), "auto", ValueError, "no parameter that requires grad"),
        (make("lstm").model, "functional", LinearizationError, "functional.* cannot be used"),
        (nn.LazyLinear(3), "auto", ValueError, "uninitialised"),
    ],
)
def test_errors(model: nn.Module, backend: str, error_type: type[Exception], match: str) -> None:
    inputs: Any = randn(2, 3, 2) if isinstance(getattr(model, "rnn", None), nn.LSTM) else randn(5, 3)
    with pytest.raises(error_type, match=match):
        hessfree.linearize(model, inputs, backend=backend)


def test_detached_outputs_are_an_error() -> None:
    class Detached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x).detach()

    with pytest.raises(ValueError, match="no output of Detached .* depends on its parameters"):
        hessfree.linearize(Detached(), randn(2, 3))


def test_a_forward_that_raises_leaves_no_hooks() -> None:
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        hessfree.linearize(mlp(3, 4, 2), randn(5, 7))
    assert not nn.modules.module._global_forward_hooks
    assert not nn.modules.module._global_forward_pre_hooks
