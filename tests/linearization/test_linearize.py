"""The public `linearize(model, inputs)`."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hessfree
from hessfree import GaussNewton
from hessfree.linearization import LinearizationError, TracedLinearization
from hessfree.linearization.traced import traces_of
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


class Branching(nn.Module):
    """Has another graph for other data, and hence no trace."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(3, 4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) if x.sum() > 0 else -self.net(x)


def test_traced_by_default_and_once_for_the_life_of_a_model() -> None:
    model = mlp(3, 4, 2)
    for step in range(3):
        x = randn(5, 3, seed=step)
        j = hessfree.linearize(model, x)
        assert j.name == "traced"
        assert GaussNewton.from_model(model, x).linearization.name == "traced"
        assert GaussNewton.from_loss(model, F.mse_loss, x, randn(5, 2)).linearization.name == "traced"
        other = hessfree.linearize(model, x, backend="graph")
        v, u = randn(26, seed=3), randn(10, seed=4)
        assert error(j.jvp(v), other.jvp(v)) <= 1e-13
        assert error(j.vjp(u), other.vjp(u)) <= 1e-13
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.1)
    assert (traces_of(model).misses, traces_of(model).hits) == (1, 8)
    assert traces_of(mlp(3, 4, 2)).misses == 0
    alive = weakref.ref(traces_of(model))
    del model, j, other, p
    gc.collect()
    assert alive() is None


def test_a_trace_that_was_asked_for_and_cannot_be() -> None:
    model, x = Branching(), randn(5, 3)
    assert hessfree.linearize(model, x).name == "graph"
    cure = "linearization='traced' cannot be used: .*get value out of a tracing tensor.*; use linearization='auto'"
    for build in (
        lambda: hessfree.linearize(model, x, backend="traced"),
        lambda: GaussNewton.from_model(model, x, linearization="traced"),
        lambda: GaussNewton.from_loss(model, F.mse_loss, x, randn(5, 2), linearization="traced"),
    ):
        with pytest.raises(LinearizationError, match=cure):
            build()


def test_a_wrong_trace_is_said_and_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    right = TracedLinearization.jvp
    monkeypatch.setattr(TracedLinearization, "jvp", lambda self, v: right(self, v) * (1 + 1e-6))
    model, x, v = mlp(3, 4, 2), randn(5, 3), randn(26)
    with pytest.warns(UserWarning, match="the trace of Sequential is not used: .*Jv differs.*graph is used instead"):
        j = hessfree.linearize(model, x)
    assert error(j.jvp(v), hessfree.linearize(model, x, backend="graph").jvp(v)) <= 1e-14
    with pytest.raises(LinearizationError, match="Jv differs"):
        hessfree.linearize(model, x, backend="traced")


def test_numbers_that_are_not_finite_tell_nothing_of_a_trace() -> None:
    model, x = mlp(3, 4, 2), randn(5, 3)
    bad = x.clone()
    bad[2, 1] = float("nan")
    assert [hessfree.linearize(model, inputs).name for inputs in (bad, x, x)] == ["graph", "traced", "traced"]
    # a trace that was compared before takes what autograd saved: as right as the graph, and as far from finite
    found, truth = hessfree.linearize(model, bad), hessfree.linearize(model, bad, backend="graph")
    assert found.name == "traced"
    v = randn(sum(p.numel() for p in model.parameters()))
    torch.testing.assert_close(found.jvp(v), truth.jvp(v), equal_nan=True)


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
