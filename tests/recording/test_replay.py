"""Running a closure again: the same world, other parameters, nothing left behind."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hessfree.linearization import GraphLinearization
from hessfree.recording import Recording, find_cut, make_cut, replay
from tests.architectures import randn
from tests.networks import PROBLEMS, make
from tests.oracle import at, error, flat, recorded, truth
from tests.problem import Problem, simple


def trial(problem: Problem, recording: Recording, step: Tensor, closure: Callable[[], Any] | None = None) -> float:
    parameters = problem.parameters
    backup = parameters.backup()
    parameters.try_step(backup, step)
    try:
        return replay(closure or problem.closure, recording, parameters)
    finally:
        parameters.restore(backup)


@pytest.mark.parametrize("name", PROBLEMS)
def test_loss_at_trial_parameters_and_products_stay_legal_and_right(name: str) -> None:
    problem = make(name)
    true = truth(problem)
    theta = flat([p.detach() for p in problem.model.parameters() if p.requires_grad])
    recording, parameters = recorded(problem), problem.parameters
    j = GraphLinearization(make_cut(recording, parameters, find_cut(recording, parameters)).outputs, parameters)
    v, step = randn(len(theta), seed=3), 0.1 * randn(len(theta), seed=4)
    before, grads, state = j.jvp(v), parameters.gradients(), torch.get_rng_state()
    expected = at(problem, theta + step, problem.forward)
    torch.set_rng_state(state)
    problem.model.zero_grad = lambda: None  # as HessianFree.zero_grad is while it replays
    assert replay(problem.closure, recording, parameters) == pytest.approx(float(recording.loss.detach()), rel=1e-12)
    found = trial(problem, recording, step)
    assert found == pytest.approx(float(expected.detach()), rel=1e-11)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(parameters.gradients(), grads)
    assert torch.equal(j.jvp(v), before)
    assert error(j.jvp(v), true.jacobian @ v) <= 1e-12
    assert error(j.vjp(j.jvp(v)), true.jacobian.T @ (true.jacobian @ v)) <= 1e-12


class Stateful(nn.Module):
    """Buffers of every kind: written in place, replaced, born late, none; one of them shapes the output."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(3, 2)
        self.norm = nn.BatchNorm1d(2)
        self.register_buffer("scale", torch.ones(2))
        self.register_buffer("replaced", torch.zeros(2))
        self.register_buffer("nothing", None)

    def forward(self, x: Tensor) -> Tensor:
        z = self.norm(self.net(x)) * self.scale.clone()
        with torch.no_grad():
            self.scale.mul_(0.9).add_(0.1 * z.detach().std(0))
            self.replaced = self.replaced + z.mean(0).detach()
            if self.nothing is None:
                self.nothing = torch.full((2,), 2.0, dtype=x.dtype)
            else:
                self.nothing += 1
            if "late" not in self._buffers:
                self.register_buffer("late", torch.zeros(1))
        return z + self.nothing


def problem_of(kind: type[nn.Module]) -> Problem:
    torch.manual_seed(1)
    return simple(kind(), randn(6, 3), F.mse_loss, randn(6, 2))


def test_buffers_start_as_they_did_and_end_as_after_one_call() -> None:
    problem = problem_of(Stateful)
    recording = recorded(problem)
    module = problem.model
    after = {n: (b, b.clone()) for n, b in module.named_buffers()}
    assert set(after) >= {"scale", "replaced", "nothing", "late"}
    problem.model.zero_grad = lambda: None
    for _ in range(2):
        assert replay(problem.closure, recording, problem.parameters) == float(recording.loss.detach())
        now = dict(module.named_buffers())
        assert now.keys() == after.keys()
        assert all(now[n] is b and torch.equal(b, value) for n, (b, value) in after.items())
    recording.before.restore()
    assert module.nothing is None
    assert "late" not in module._buffers
    assert torch.equal(module.replaced, torch.zeros(2, dtype=torch.float64))
    assert int(module.norm.num_batches_tracked) == 0


def test_a_graph_that_saved_a_buffer_stays_legal() -> None:
    class Codebook(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(3, 2)
            self.register_buffer("book", torch.ones(2))

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                self.book.mul_(0.5)
            return (self.net(x) * self.book).tanh()

    problem = problem_of(Codebook)
    recording, parameters = recorded(problem), problem.parameters
    problem.model.zero_grad = lambda: None
    j = GraphLinearization(make_cut(recording, parameters, find_cut(recording, parameters)).outputs, parameters)
    v = randn(8)
    before = j.jvp(v)
    trial(problem, recording, 0.1 * v)
    assert torch.equal(j.jvp(v), before)
    assert torch.equal(problem.model.book, torch.full((2,), 0.5, dtype=torch.float64))


def test_every_source_of_random_numbers_is_replayed_and_then_left_as_after_one_call() -> None:
    problem = make("mean_squared_error")
    own, late = torch.Generator().manual_seed(3), torch.Generator().manual_seed(4)
    drawn: list[list[float]] = []

    def closure() -> Tensor:
        draws = [
            float(torch.rand(())),
            random.random(),
            float(np.random.rand()),
            float(torch.rand((), generator=own)),
            float(torch.randperm(9, generator=late)[0]),
            float(torch.empty(1).normal_(generator=own)),
        ]
        drawn.append(draws)
        loss = problem.forward() * (1 + sum(draws))
        loss.backward()
        return loss

    recording = recorded(problem, closure)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist(), own.get_state()
    assert replay(closure, recording, problem.parameters) == float(recording.loss.detach())
    assert drawn[0] == drawn[1]
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]
    assert torch.equal(own.get_state(), states[3])


def test_several_backward_calls_and_factors_are_replayed() -> None:
    problem = make("mean_squared_error")

    def closure() -> Tensor:
        problem.forward().backward(gradient=torch.tensor(2.0, dtype=torch.float64))
        loss = problem.forward()
        loss.backward()
        return loss

    recording = recorded(problem, closure)
    assert replay(closure, recording, problem.parameters) == pytest.approx(float(recording.loss.detach()), rel=1e-14)


def test_a_loss_without_backward_is_replayed() -> None:
    problem = make("mean_squared_error")
    recording = recorded(problem, problem.forward)
    assert replay(problem.forward, recording, problem.parameters) == float(recording.loss.detach())


def test_gradients_can_be_clipped_in_a_replay_and_come_back() -> None:
    problem = make("mean_squared_error")

    def closure() -> Tensor:
        problem.model.zero_grad()
        loss = problem.forward()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(problem.model.parameters(), 1e-2)
        assert float(norm) > 0
        return loss

    recording = recorded(problem, closure)
    objects = [p.grad for p in problem.model.parameters()]
    values = problem.parameters.gradients()
    replay(closure, recording, problem.parameters)
    assert all(p.grad is g for p, g in zip(problem.model.parameters(), objects, strict=True))
    assert torch.equal(problem.parameters.gradients(), values)


def test_a_closure_that_hooks_its_tensors_needs_a_graph_and_gets_one() -> None:
    problem = make("mean_squared_error")

    def closure() -> Tensor:
        z = problem.model(problem.inputs)
        z.retain_grad()
        z.register_hook(lambda g: g)
        loss = F.mse_loss(z, problem.targets)
        loss.backward()
        return loss

    recording = recorded(problem, closure)
    assert replay(closure, recording, problem.parameters) == float(recording.loss.detach())
    assert recording.differentiated


def test_an_exception_in_a_replay_leaves_everything_as_after_one_call() -> None:
    problem = make("conv_batchnorm")
    failing = False

    def closure() -> Tensor:
        loss = problem.closure()
        if failing:
            raise RuntimeError("own error")
        return loss

    recording, parameters = recorded(problem, closure), problem.parameters
    mean, state, grads = problem.model.norm.running_mean.clone(), torch.get_rng_state(), parameters.gradients()
    failing = True
    with pytest.raises(RuntimeError, match="own error"):
        replay(closure, recording, parameters)
    assert torch.equal(problem.model.norm.running_mean, mean)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(parameters.gradients(), grads)
    assert not torch.overrides._get_current_function_mode_stack()


def test_no_graph_is_built_in_a_replay() -> None:
    problem = make("mean_squared_error")
    recording = recorded(problem)
    seen: list[bool] = []

    def closure() -> Tensor:
        loss = problem.forward()
        seen.append(loss.requires_grad)
        loss.backward()
        return loss

    replay(closure, recording, problem.parameters)
    assert seen == [False]
