"""Layers that K-FAC declines, since their parameters act beside what they return; and what serves them instead."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hessfree import CG, KFAC, ConstantDamping, HessianFree
from hessfree.preconditioners import Woodbury
from tests.preconditioners.oracles import dense, sample_of
from tests.preconditioners.pinn import Poisson, curvature_of, poisson

DOUBLE = torch.float64


def sizes(problem: Poisson) -> int:
    return sum(p.numel() for p in problem.net.parameters())


@pytest.mark.parametrize("together", [True, False])
def test_a_layer_differentiated_in_its_input_has_the_diagonal_and_the_user_is_told(together: bool) -> None:
    problem = poisson(2, 5, 5, 1, together=together)
    curvature, sample = curvature_of(problem.net, problem.closure)
    state, warning = KFAC().update({}, sample, 1)
    assert warning is not None and "declines" in warning and "[5, 2]" in warning and "Woodbury" in warning
    assert state["blocks"] == [] and state["declined"] == list(range(6))
    words = "diagonal of 6 other parameters (6 of layers that are differentiated in their input)"
    assert words in KFAC().describe(state)
    # the diagonal is unbiased: 400 draws of random signs
    expected = curvature.operator.to_dense().diagonal()
    draws = []
    for seed in range(400):
        state, _ = KFAC().update({}, dataclasses.replace(sample, seed=seed), 1)
        draws.append(dense(state, sample.parameters).diagonal())
    error, spread = torch.stack(draws).mean(0) - expected, torch.stack(draws).std(0) / math.sqrt(len(draws))
    assert bool((error.abs() <= 5 * spread + 1e-10 * expected.max()).all())


def test_only_the_layers_concerned_are_declined() -> None:
    class ByHand(nn.Module):
        """The first weight is used a second time, by hand; the other layers are plain."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(F.linear(self.first(x).tanh(), self.first.weight))

    torch.manual_seed(0)
    sample = sample_of(ByHand().double(), torch.randn(6, 3, dtype=DOUBLE), lambda z: z.square().mean())
    state, warning = KFAC().update({}, sample, 1)
    assert warning is not None and "[3, 3]" in warning and "[2, 3]" not in warning
    assert [b["weight"] for b in state["blocks"]] == [2] and state["declined"] == [0, 1]


def test_what_was_learned_of_a_layer_is_dropped_when_it_is_declined() -> None:
    problem = poisson(2, 4, 1)

    def supervised() -> Tensor:
        loss = problem.net(problem.inside).square().mean()
        loss.backward()
        return loss

    state, warning = KFAC().update({}, curvature_of(problem.net, supervised)[1], 1)
    assert warning is None and len(state["blocks"]) == 2 and state["declined"] == []
    state, warning = KFAC().update(state, curvature_of(problem.net, problem.closure)[1], 2)
    assert warning is not None and state["blocks"] == [] and set(state["diagonal"]) == {0, 1, 2, 3}


@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize("together", [True, False])
def test_woodbury_of_all_samples_is_the_exact_damped_inverse(together: bool, scale: float) -> None:
    problem = poisson(2, 6, 6, 1, together=together)
    curvature, sample = curvature_of(problem.net, problem.closure, scale, shift=1e-3)
    shifts = [1e-3] * 6
    woodbury = Woodbury(samples=None, damping_scale=1.0)
    state, _ = woodbury.update({}, sample, 1)
    assert woodbury.describe(state) == "Woodbury: 28 rows of the Jacobian (all samples)"
    apply = woodbury.inverse(state, sample.parameters, scale, shifts)
    assert apply is not None
    matrix = scale * curvature.operator.to_dense() + 1e-3 * torch.eye(sizes(problem), dtype=DOUBLE)
    b = torch.randn(sizes(problem), dtype=DOUBLE)
    expected = torch.linalg.solve(matrix, b)
    assert (apply(b) - expected).norm() <= 1e-8 * expected.norm()


def test_woodbury_of_some_samples_shares_them_among_the_outputs() -> None:
    problem = poisson(2, 6, 1)
    _, sample = curvature_of(problem.net, problem.closure, shift=0.1)
    state, _ = Woodbury(samples=14).update({}, sample, 1)
    assert state["factor"].shape == (14, 14) and not state["complete"]  # 10 of 20 inside, 4 of 8 on the boundary
    apply = Woodbury(samples=14).inverse(state, sample.parameters, 1.0, [0.1] * 4)
    assert apply is not None
    found = torch.stack([apply(unit) for unit in torch.eye(sizes(problem), dtype=DOUBLE)], 1)
    assert (found - found.T).norm() <= 1e-10 * found.norm()
    assert torch.linalg.eigvalsh(found).min() > 0


def test_a_step_of_the_optimizer_is_the_damped_gauss_newton_step() -> None:
    problem = poisson(2, 6, 6, 1)
    params = list(problem.net.parameters())
    curvature, sample = curvature_of(problem.net, problem.closure)
    matrix = curvature.operator.to_dense() + 1e-2 * torch.eye(sizes(problem), dtype=DOUBLE)
    gradient = sample.parameters.flatten([p.grad for p in params])
    before = sample.parameters.flatten([p.detach().clone() for p in params])
    optimizer = HessianFree(
        params, damping=1e-2, damping_rule=ConstantDamping(), solver=CG(max_iterations=1),
        preconditioner=Woodbury(samples=None, damping_scale=1.0),
    )  # fmt: skip
    with pytest.warns(UserWarning, match="K-FAC declines"):
        optimizer.step(problem.closure)
    step = sample.parameters.flatten([p.detach() for p in params]) - before
    expected = -torch.linalg.solve(matrix, gradient)
    assert optimizer.last_step is not None and optimizer.last_step.accepted
    assert (step - expected).norm() <= 1e-8 * expected.norm()
    assert "all samples" in optimizer.last_step.preconditioner
