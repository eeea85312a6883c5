"""The torch.func back end: right, or replaced by the graph with one warning; never silently wrong."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from hessfree.linearization import (
    Evaluation,
    FunctionalLinearization,
    Linearization,
    LinearizationError,
    TraceCache,
    choose,
    linearize,
)
from hessfree.recording import find_cut, make_cut
from tests.architectures import randn
from tests.networks import PROBLEMS, make
from tests.oracle import error, recorded, truth
from tests.problem import Problem


def asked_for_functional(problem: Problem) -> tuple[Linearization, list[str]]:
    recording, parameters = recorded(problem), problem.parameters
    cut = make_cut(recording, parameters, find_cut(recording, parameters))
    said: list[str] = []
    evaluation = Evaluation(recording, cut.outputs, cut.calls, parameters)
    found = choose("functional", evaluation, parameters, TraceCache(), said.append)
    assert found is not None
    return found, said


@pytest.mark.parametrize("name", PROBLEMS)
def test_right_or_replaced(name: str) -> None:
    problem = make(name)
    true = truth(problem)
    found, said = asked_for_functional(problem)
    if problem.functional:
        assert (found.name, said) == ("functional", [])
    else:
        assert found.name == "graph"
        assert len(said) == 1
        assert "linearization='functional' cannot be used" in said[0]
    rows, columns = true.jacobian.shape
    for seed in (3, 4, 3):
        v, u = randn(columns, seed=seed), randn(rows, seed=seed)
        assert error(found.jvp(v), true.jacobian @ v) <= 1e-11
        assert error(found.vjp(u), true.jacobian.T @ u) <= 1e-11
    assert error(found.vjps(torch.eye(rows, dtype=torch.float64)), true.jacobian) <= 1e-11


def test_buffers_and_random_state_stay_the_users() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1)).double()
    x = randn(6, 3)
    torch.manual_seed(0)
    model(x)
    mean, state = model[1].running_mean.clone(), torch.get_rng_state()
    model[1].reset_running_stats()
    torch.manual_seed(0)
    j = linearize(model, x, backend="functional")
    j.jvp(randn(29))
    j.vjp(j.outputs)
    assert torch.equal(model[1].running_mean, mean)  # as after one ordinary call
    assert torch.equal(torch.get_rng_state(), state)


class Masked(nn.Module):
    """The trap: torch.func.linearize keeps in-place writes in the function that it returns."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.first, self.second, self.kind = nn.Linear(3, 4), nn.Linear(4, 2), kind

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        if self.kind == "column":
            h[:, 0] = 0
        elif self.kind == "scale":
            h.mul_(2)
        elif self.kind == "add":
            h += x.sum()
        elif self.kind == "relu":
            torch.relu_(h)
        elif self.kind == "buffer":
            out = torch.empty_like(h)
            out[:] = h.sin()
            h = out
        return self.second(h.tanh())


@pytest.mark.parametrize("kind", ["column", "scale", "add", "relu", "buffer"])
def test_in_place_operations_are_never_silently_wrong(kind: str) -> None:
    model = Masked(kind).double()
    problem = make("mean_squared_error")
    problem.model, problem.forward = model, lambda: model(randn(5, 3)).square().mean()
    problem.outputs = lambda: (model(randn(5, 3)),)
    problem.ell = lambda z: z[0].square().mean()
    true = truth(problem)
    found, said = asked_for_functional(problem)
    assert len(said) == (0 if found.name == "functional" else 1)
    for seed in range(4):
        v = randn(true.jacobian.shape[1], seed=seed)
        assert error(found.jvp(v), true.jacobian @ v) <= 1e-11


def test_the_wrong_product_of_an_in_place_mask_is_what_the_self_test_finds() -> None:
    """Shows that the case above is not vacuous: without the test the product is wrong."""
    problem = make("in_place")
    recording, parameters = recorded(problem), problem.parameters
    cut = make_cut(recording, parameters, find_cut(recording, parameters))
    untested = FunctionalLinearization(cut.calls, cut.outputs, parameters)
    v = randn(parameters.size)
    wrong = max(error(untested.jvp(v), truth(problem).jacobian @ v) for _ in range(3))
    assert wrong > 1e-3
    assert "differs" in asked_for_functional(problem)[1][0]


def test_refusals_say_why() -> None:
    parameters = make("mean_squared_error").parameters
    with pytest.raises(LinearizationError, match="marked"):
        FunctionalLinearization([], [], parameters)
    for name, why in (("encoder_decoder", "require grad"), ("differential_equation", "marked")):
        assert why in asked_for_functional(make(name))[1][0]
    problem = make("logits_and_loss")
    recording, parameters = recorded(problem, keep_inputs=False), problem.parameters
    cut = make_cut(recording, parameters, find_cut(recording, parameters))
    with pytest.raises(LinearizationError, match="not kept"):
        FunctionalLinearization(cut.calls, cut.outputs, parameters)


@pytest.mark.parametrize("backend", ["functional", "traced", "graph"])
def test_a_module_that_stands_in_two_places_keeps_its_parameters(backend: str) -> None:
    """torch.func.functional_call, given both names, leaves plain tensors in the user's model."""
    model = make("shared_module").model
    before = list(model.parameters())
    found = linearize(model, randn(4, 3), backend=backend)
    assert found.name == backend
    found.jvp(randn(31))
    after = list(model.parameters())
    assert all(p is q for p, q in zip(after, before, strict=True))
    assert all(isinstance(p, nn.Parameter) for p in model.parameters())
    reference = linearize(model, randn(4, 3), backend="graph")
    assert error(found.jvp(randn(31)), reference.jvp(randn(31))) <= 1e-12
    assert all(isinstance(p, nn.Parameter) and p is q for p, q in zip(after, before, strict=True))
