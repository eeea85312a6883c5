"""Every way in which a closure can be wrong: an error that names the cure, and the world as it was."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import hessfree
from hessfree.recording import CallTree, Owners, mark_outputs, record
from hessfree.vectors import ParameterVector
from tests.architectures import randn
from tests.recording.setting import Setting, no_hooks_left


def returns(value: Any) -> Callable[[Setting], Callable[[], Any]]:
    def make_closure(s: Setting) -> Callable[[], Any]:
        def closure() -> Any:
            loss = s.loss()
            loss.backward()
            return value(loss)

        return closure

    return make_closure


def calls(function: Callable[[Tensor, Setting], Any]) -> Callable[[Setting], Callable[[], Any]]:
    def make_closure(s: Setting) -> Callable[[], Any]:
        def closure() -> Any:
            loss = s.loss()
            function(loss, s)
            return loss

        return closure

    return make_closure


def scaled_by_a_grad_scaler(s: Setting) -> Callable[[], Any]:
    scaler = torch.amp.GradScaler("cpu")
    return calls(lambda loss, _: scaler.scale(loss).backward())(s)


BAD: dict[str, tuple[Callable[[Setting], Callable[[], Any]], type[Exception], str]] = {
    "None": (returns(lambda _: None), TypeError, "returned None of type NoneType.*return loss"),
    "float": (returns(lambda loss: loss.item()), TypeError, "of type float, not a tensor"),
    "vector": (returns(lambda loss: loss.expand(3)), ValueError, r"shape \(3,\), not a scalar"),
    "no graph": (lambda s: lambda: s.loss().detach(), RuntimeError, "without a graph.*never called backward"),
    "inputs": (
        calls(lambda loss, s: loss.backward(inputs=list(s.model.parameters()))),
        RuntimeError,
        r"backward\(inputs=...\)",
    ),
    "autograd.backward": (
        calls(lambda loss, _: torch.autograd.backward(loss)),
        RuntimeError,
        r"torch.autograd.backward.*loss.backward\(\)",
    ),
    "autograd.backward of a list": (
        calls(lambda loss, _: torch.autograd.backward([loss])),
        RuntimeError,
        r"torch.autograd.backward",
    ),
    "autograd.grad": (
        calls(lambda loss, s: torch.autograd.grad(loss, list(s.model.parameters()), retain_graph=True)),
        RuntimeError,
        r"torch.autograd.grad on the loss.*loss.backward\(\)",
    ),
    "GradScaler": (scaled_by_a_grad_scaler, RuntimeError, "65536 times the loss.*drop the GradScaler"),
    "own exception": (calls(lambda *_: {}["no such key"]), KeyError, "no such key"),
    "error in a module": (lambda s: lambda: s.model(randn(6, 5)), RuntimeError, "cannot be multiplied"),
    "backward of a vector": (
        calls(lambda loss, s: s.model(s.x).backward()),
        RuntimeError,
        "implicitly created only for scalar",
    ),
    "keyboard": (calls(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)), KeyboardInterrupt, "^$"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_closures_end_in_an_error_and_leave_no_trace(name: str, setting: Setting) -> None:
    make_closure, kind, match = BAD[name]
    own = torch.Generator().manual_seed(3)
    buffers = {n: b.clone() for n, b in setting.model.named_buffers()}
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist(), own.get_state()
    closure = make_closure(setting)

    def drawing() -> Any:
        torch.randn(2), random.random(), np.random.rand(), torch.rand(2, generator=own)  # noqa: NPY002
        return closure()

    with pytest.raises(kind, match=match):
        setting.run(drawing)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]
    assert torch.equal(own.get_state(), states[3])
    assert all(torch.equal(b, buffers[n]) for n, b in setting.model.named_buffers())
    assert no_hooks_left()
    mark_outputs(setting.x)  # a no-op again


def test_a_loss_scaled_by_hand_is_no_grad_scaler(setting: Setting) -> None:
    def closure() -> Tensor:
        loss = setting.loss()
        (loss * 4).backward()
        return loss

    recording = setting.run(closure)
    assert abs(float(recording.loss.detach()) - 4 * float(recording.returned.detach())) <= 1e-14


def test_sparse_gradients_are_an_error() -> None:
    embedding = nn.Embedding(5, 2, sparse=True)
    parameters = ParameterVector(list(embedding.parameters()))
    tree = CallTree(Owners(parameters), parameters.device, lambda _: True, lambda _: True)
    with pytest.raises(RuntimeError, match=r"shape \(5, 2\) is sparse .*sparse=False"):
        record(lambda: embedding(torch.tensor([1, 2])).square().sum(), parameters, tree)


def test_an_exception_that_the_closure_catches_leaves_the_tree_whole(setting: Setting) -> None:
    def closure() -> Tensor:
        try:
            setting.model(randn(6, 5))
        except RuntimeError:
            pass
        loss = setting.loss()
        loss.backward()
        return loss

    roots = setting.run(closure).roots
    assert [(len(root.outputs), len(root.children)) for root in roots] == [(0, 1), (1, 3)]


def test_gradients_assigned_by_hand_are_refused() -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1)
    optimizer = hessfree.HessianFree(model.parameters())

    def closure() -> torch.Tensor:
        loss = model(torch.ones(4, 3)).square().mean()
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        return loss

    with pytest.raises(RuntimeError, match=r"without loss.backward\(\)"):
        optimizer.step(closure)
    optimizer.zero_grad(set_to_none=False)  # zeros are no gradients
    optimizer.step(lambda: model(torch.ones(4, 3)).square().mean())
    assert optimizer.last_step.accepted
