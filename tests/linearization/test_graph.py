"""J and Jᵀ from the kept graph, against a dense Jacobian."""

from __future__ import annotations

import pytest
import torch

from hessfree.linearization import GraphLinearization, LinearizationError
from hessfree.recording import Output, find_cut, make_cut
from tests.architectures import randn
from tests.networks import PROBLEMS, make
from tests.oracle import error, recorded, truth
from tests.problem import Problem


def linearized(problem: Problem) -> GraphLinearization:
    recording = recorded(problem)
    parameters = problem.parameters
    return GraphLinearization(make_cut(recording, parameters, find_cut(recording, parameters)).outputs, parameters)


@pytest.mark.parametrize("name", PROBLEMS)
def test_products_are_those_of_the_dense_jacobian(name: str) -> None:
    problem = make(name)
    true = truth(problem)
    j = linearized(problem)
    rows, columns = true.jacobian.shape
    v, u = randn(columns, seed=11), randn(rows, seed=12)
    for _ in range(2):  # products repeat
        assert error(j.jvp(v), true.jacobian @ v) <= 1e-12
        assert error(j.vjp(u), true.jacobian.T @ u) <= 1e-12
    assert abs(float(u @ j.jvp(v) - j.vjp(u) @ v)) <= 1e-12 * float(u.norm() * j.jvp(v).norm())


@pytest.mark.parametrize("name", PROBLEMS)
def test_all_rows_at_once(name: str) -> None:
    problem = make(name)
    true = truth(problem)
    found = linearized(problem).vjps(torch.eye(len(true.jacobian), dtype=torch.float64))
    assert error(found, true.jacobian) <= 1e-12


@pytest.mark.parametrize("name", sorted(PROBLEMS.keys() - {"in_place_after"}))
def test_outputs_are_those_of_the_network(name: str) -> None:
    problem = make(name)
    assert error(linearized(problem).outputs, truth(problem).outputs) <= 1e-13


def test_a_product_leaves_gradients_random_state_and_parameters_alone() -> None:
    problem = make("dropout")
    j = linearized(problem)
    grads = [p.grad.clone() for p in problem.model.parameters()]
    state = torch.get_rng_state()
    j.jvp(randn(problem.parameters.size))
    j.vjp(randn(j.space.size))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p.grad, g) for p, g in zip(problem.model.parameters(), grads, strict=True))


def test_outputs_that_no_parameter_of_ours_reaches_have_a_jacobian_of_zeros() -> None:
    problem = make("mean_squared_error")
    other = torch.ones(3, dtype=torch.float64, requires_grad=True)
    j = GraphLinearization(Output.all_of(other * 2), problem.parameters)
    assert float(j.jvp(randn(problem.parameters.size)).abs().max()) == 0
    assert float(j.vjp(randn(3)).abs().max()) == 0


def test_values_that_were_not_kept_are_an_error() -> None:
    problem = make("mean_squared_error")
    z = problem.outputs()
    with pytest.raises(LinearizationError, match="not kept"):
        _ = GraphLinearization(Output.all_of(z, keep_value=False), problem.parameters).outputs


def test_vectors_stay_in_the_dtype_of_the_parameters() -> None:
    net = torch.nn.Linear(3, 2)
    with torch.autocast("cpu", torch.bfloat16):
        z = net(torch.randn(4, 3))
    assert z.dtype == torch.bfloat16
    problem = make("mean_squared_error")
    problem.model = net
    j = GraphLinearization(Output.all_of(z), problem.parameters)
    assert j.jvp(torch.randn(8)).dtype == torch.float32
    assert j.vjp(torch.randn(8)).dtype == torch.float32
