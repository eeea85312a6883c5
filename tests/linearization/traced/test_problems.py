"""The table of networks against dense Jacobians: right at every step, or refused with the reason."""

from __future__ import annotations

import pytest
import torch

from hessfree.linearization import LinearizationError
from hessfree.linearization.traced import StackedLinearization, TraceCache, TracedLinearization, linearize_calls
from hessfree.recording import find_cut, make_cut
from tests.architectures import randn
from tests.networks import PROBLEMS, make
from tests.oracle import error, recorded, truth
from tests.problem import Problem

REFUSED = {
    "encoder_decoder": "the inputs of Sequential may depend on parameters",
    "regularised_code": "the inputs of Sequential may depend on parameters",
    "differential_equation": "were marked",
    "checkpointed": "draws random numbers in the backward pass",
}


def linearized(problem: Problem, cache: TraceCache) -> TracedLinearization | StackedLinearization:
    recording, parameters = recorded(problem), problem.parameters
    cut = make_cut(recording, parameters, find_cut(recording, parameters))
    return linearize_calls(recording.roots, cut.calls, cut.outputs, parameters, cache)


@pytest.mark.parametrize("name", [name for name in PROBLEMS if name not in REFUSED])
def test_right_at_three_steps(name: str) -> None:
    problem, cache = make(name), TraceCache()
    own = [id(p) for p in problem.model.parameters()]
    for step in range(3):
        true = truth(problem)
        rows, columns = true.jacobian.shape
        j = linearized(problem, cache)
        assert error(j.outputs, true.outputs) <= 1e-12
        for seed in (3, 4, 3):
            v, u = randn(columns, seed=seed), randn(rows, seed=seed)
            assert error(j.jvp(v), true.jacobian @ v) <= 1e-10
            assert error(j.vjp(u), true.jacobian.T @ u) <= 1e-10
            assert error(j.gauss_newton(v, u), true.jacobian.T @ (u * (true.jacobian @ v))) <= 1e-10
        assert error(j.vjps(torch.eye(rows, dtype=torch.float64)), true.jacobian) <= 1e-10
        with torch.no_grad():
            for p in problem.parameters.params:
                p.add_(0.1 * randn(*p.shape, seed=step))
        torch.manual_seed(0)
    assert [id(p) for p in problem.model.parameters()] == own
    calls = 2 if isinstance(j, StackedLinearization) else 1  # of one signature, hence of one trace
    assert (cache.misses, cache.hits) == (1, 3 * calls - 1)


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    with pytest.raises(LinearizationError, match=REFUSED[name]):
        linearized(make(name), TraceCache())
