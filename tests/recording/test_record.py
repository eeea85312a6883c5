"""Running a closure once: its loss and gradient, and what it leaves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hessfree.recording import CallTree, Owners, mark_outputs, record
from hessfree.vectors import ParameterVector
from tests.architectures import mlp, randn
from tests.networks import PROBLEMS, make
from tests.oracle import error, recorded, truth
from tests.recording.setting import Setting, no_hooks_left


@pytest.mark.parametrize("name", PROBLEMS)
def test_gradient_and_loss_are_the_users(name: str) -> None:
    problem = make(name)
    true = truth(problem).gradient
    recording = recorded(problem)
    assert error(recording.gradient, true) <= 1e-12
    assert torch.equal(problem.parameters.gradients(), recording.gradient)
    assert torch.equal(recording.returned, recording.loss) and not recording.returned.requires_grad
    assert (recording.accumulated, recording.backwards) == (False, 1)
    torch.manual_seed(0)
    assert float(problem.forward().detach()) == pytest.approx(float(recording.loss.detach()), rel=1e-12)
    assert no_hooks_left()


def test_world_after_is_the_world_after_one_ordinary_call(setting: Setting) -> None:
    random_before = torch.get_rng_state()
    buffers = {n: b.clone() for n, b in setting.model.named_buffers()}
    setting.loss().backward()
    expected = {n: b.clone() for n, b in setting.model.named_buffers()}, torch.get_rng_state()
    setting.model.load_state_dict(buffers, strict=False)
    torch.set_rng_state(random_before)
    setting.model.zero_grad()

    def closure() -> Tensor:
        loss = setting.loss()
        loss.backward()
        return loss

    recording = setting.run(closure)
    assert torch.equal(torch.get_rng_state(), expected[1])
    assert all(torch.equal(b, expected[0][n]) for n, b in setting.model.named_buffers())
    recording.before.restore()
    assert torch.equal(torch.get_rng_state(), random_before)
    assert all(torch.equal(b, buffers[n]) for n, b in setting.model.named_buffers())
    recording.after.restore()
    assert torch.equal(torch.get_rng_state(), expected[1])
    assert all(torch.equal(b, expected[0][n]) for n, b in setting.model.named_buffers())


def test_several_backward_calls_sum(setting: Setting) -> None:
    setting.model.eval()

    def closure() -> Tensor:
        first, second = setting.loss(), setting.model(setting.x).square().mean()
        first.backward()
        second.backward(gradient=torch.tensor(3.0, dtype=torch.float64))
        return first

    recording = setting.run(closure)
    expected = setting.loss() + 3 * setting.model(setting.x).square().mean()
    assert float((recording.loss - expected).detach().abs()) <= 1e-14
    assert recording.backwards == 2
    grads = torch.autograd.grad(expected, setting.parameters.params)
    assert error(recording.gradient, setting.parameters.flatten(grads)) <= 1e-13


def test_backward_of_a_vector_with_a_gradient(setting: Setting) -> None:
    weights = torch.linspace(0, 1, 6, dtype=torch.float64)

    def closure() -> Tensor:
        each = (setting.model(setting.x) - setting.y).square().mean(1)
        each.backward(weights)
        return each.mean()

    recording = setting.run(closure)
    assert recording.loss.shape == ()
    grads = torch.autograd.grad(recording.loss, setting.parameters.params, retain_graph=True)
    assert error(recording.gradient, setting.parameters.flatten(grads)) <= 1e-13


def test_a_loss_of_shape_one_is_a_scalar(setting: Setting) -> None:
    recording = setting.run(lambda: setting.loss().reshape(1, 1))
    assert recording.loss.shape == ()


def test_backward_is_done_where_only_a_loss_is_returned(setting: Setting) -> None:
    recording = setting.run(setting.loss)
    grads = torch.autograd.grad(recording.loss, setting.parameters.params)
    assert error(setting.parameters.gradients(), setting.parameters.flatten(grads)) <= 1e-14
    assert recording.backwards == 1


def test_gradients_of_an_earlier_step_do_not_add_up_where_only_a_loss_is_returned(setting: Setting) -> None:
    setting.model.eval()
    first = setting.run(setting.loss)
    again = record(setting.loss, setting.parameters, Setting().tree, stale=True)
    assert torch.equal(setting.parameters.gradients(), first.gradient)
    assert not again.accumulated
    assert record(setting.loss, setting.parameters, Setting().tree).accumulated
    assert error(setting.parameters.gradients(), 2 * first.gradient) <= 1e-14


def test_accumulated_gradients_are_told_from_the_recorded_one(setting: Setting) -> None:
    setting.model.eval()
    setting.loss().backward()
    first = setting.parameters.gradients()

    def closure() -> Tensor:
        loss = 2 * setting.loss()
        loss.backward()
        nn.utils.clip_grad_norm_(setting.model.parameters(), 1e-3)
        return loss.detach()

    recording = setting.run(closure)
    assert recording.accumulated
    assert error(recording.gradient, 2 * first) <= 1e-12  # neither the accumulation nor the clipping shows
    assert abs(float(setting.parameters.gradients().norm()) - 1e-3) <= 1e-8


def test_what_is_returned_may_be_detached_or_another_number(setting: Setting) -> None:
    def closure() -> Tensor:
        loss = setting.loss()
        loss.backward()
        return torch.tensor(7.0)

    recording = setting.run(closure)
    assert float(recording.returned) == 7
    assert float(recording.loss.detach()) != 7


def test_create_graph_and_retain_graph_are_passed_on(setting: Setting) -> None:
    seen: list[bool] = []

    def closure() -> Tensor:
        loss = setting.loss()
        loss.backward(create_graph=True, retain_graph=False)
        seen.append(next(setting.model.parameters()).grad.grad_fn is not None)
        return loss

    with pytest.warns(UserWarning, match="create_graph=True"):
        recording = setting.run(closure)
    assert seen == [True]
    assert not recording.gradient.requires_grad


def test_autograd_grad_inside_is_legal_before_backward(setting: Setting) -> None:
    def closure() -> Tensor:
        x = setting.x.clone().requires_grad_()
        z = setting.model(x)
        (slope,) = torch.autograd.grad(z.sum(), x, create_graph=True)
        loss = F.mse_loss(z, setting.y) + slope.square().mean()
        loss.backward()
        return loss

    assert setting.run(closure).differentiated


def test_records_inside_no_grad(setting: Setting) -> None:
    with torch.no_grad():
        recording = setting.run(setting.loss)
    assert recording.loss.requires_grad


def test_nested_recordings_keep_their_marks_apart() -> None:
    net = mlp(2, 3, 1)
    parameters = ParameterVector(list(net.parameters()))

    def tree() -> CallTree:
        return CallTree(Owners(parameters), parameters.device, lambda _: True, lambda _: True)

    def outer() -> Tensor:
        record(lambda: mark_outputs(net(randn(4, 2))).square().sum(), parameters, tree())
        return net(randn(4, 2)).square().mean()

    assert record(outer, parameters, tree()).marks == []
