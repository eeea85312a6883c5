"""The tree of calls, the buffers seen on the way, and who owns parameters."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor, nn

from hessfree.recording import BufferStates, CallTree, Output, Owners, call_at
from hessfree.vectors import ParameterVector
from tests.architectures import Variational, mlp, randn
from tests.networks import make


def tree_for(model: nn.Module, keep: bool = True) -> CallTree:
    parameters = ParameterVector(list(model.parameters()))
    return CallTree(Owners(parameters), parameters.device, lambda _: keep, lambda path: keep or len(path) == 1)


def test_paths_children_inputs_and_order() -> None:
    model = nn.Sequential(mlp(3, 4, 2), nn.Tanh(), mlp(2, 2))
    x = randn(5, 3)
    with tree_for(model) as tree:
        model(x)
        model[0](x)
    first, second = tree.roots
    names = [(type(call.module).__name__, call.path) for call in first.walk()]
    assert names == [
        ("Sequential", (0,)),
        ("Sequential", (0, 0)),
        ("Linear", (0, 0, 0)),
        ("Linear", (0, 0, 1)),
        ("Sequential", (0, 1)),
        ("Linear", (0, 1, 0)),
    ]
    assert second.path == (1,)
    assert all(call_at(tree.roots, call.path) is call for call in first.walk())
    assert first.inputs[0] is x
    assert first.children[0].inputs[0] is x
    assert first.random is not None
    assert first.children[0].random is None


def test_inputs_and_values_are_kept_only_where_asked() -> None:
    model = nn.Sequential(mlp(3, 4, 2))
    with tree_for(model, keep=False) as tree:
        model(randn(5, 3))
    (root,) = tree.roots
    (child,) = root.children
    assert len(root.inputs) == 1
    assert child.inputs == ()
    assert root.outputs[0].value is not None
    assert child.outputs[0].value is None
    assert child.outputs[0].shape == (5, 2)


def test_keywords_are_kept() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp(3, 2)

        def forward(self, *, x: Tensor) -> Tensor:
            return self.net(x)

    model, x = Named(), randn(5, 3)
    with tree_for(model) as tree:
        model(x=x)
    assert tree.roots[0].keywords["x"] is x
    assert tree.roots[0].inputs == ()


def test_modules_without_our_parameters_are_no_calls() -> None:
    model, other = mlp(3, 2), mlp(3, 2)
    with tree_for(model) as tree:
        other(randn(5, 3))
        nn.Tanh()(randn(2))
    assert tree.roots == []


def test_outputs_in_the_order_of_the_tree() -> None:
    model = Variational().double()
    with tree_for(model) as tree:
        returned = model(randn(4, 3))
    outputs = tree.roots[0].outputs
    assert [o.leaf for o in outputs] == [0, 1, 2, 3]
    assert outputs[1].value is not None
    assert torch.equal(outputs[1].value, returned["latent"][0])
    assert not outputs[1].value.requires_grad


def test_leaves_integers_and_detached_tensors_are_no_outputs() -> None:
    p = nn.Parameter(torch.ones(2))
    others = [torch.ones(2), (p * 1).detach(), torch.arange(3), "x", None, (p * 1).to(torch.complex64)]
    assert Output.all_of([p, *others]) == ()


def test_the_signature_tells_structures_apart() -> None:
    model = nn.Sequential(mlp(3, 4, 2), nn.Tanh(), mlp(2, 2))
    x = randn(5, 3)
    signatures = []
    for calls in (1, 1, 2):
        with tree_for(model) as tree:
            for _ in range(calls):
                model(x)
        signatures.append(tuple(call.signature() for call in tree.roots))
    assert signatures[0] == signatures[1] != signatures[2]


def test_nothing_is_recorded_while_paused_or_in_another_thread() -> None:
    model = mlp(3, 2)
    with tree_for(model) as tree:
        tree.paused = True
        model(randn(5, 3))
        tree.paused = False
        other = threading.Thread(target=lambda: model(randn(5, 3)))
        other.start()
        other.join()
    assert tree.roots == []


@pytest.mark.parametrize("where", ["forward", "pre_hook", "hook"])
def test_exceptions_leave_the_tree_usable_and_no_hooks(where: str) -> None:
    model = nn.Sequential(mlp(3, 4), mlp(4, 2))

    def fail(*_: object) -> None:
        raise KeyError("own error")

    if where == "pre_hook":
        handle = model[1].register_forward_pre_hook(fail)
    elif where == "hook":
        handle = model[1].register_forward_hook(fail)
    tree = tree_for(model)
    with tree:
        with pytest.raises((KeyError, RuntimeError)):
            model(randn(5, 9 if where == "forward" else 3))
        if where != "forward":
            handle.remove()
        model(randn(5, 3))
    assert [call.path for call in tree.roots] == [(0,), (1,)]
    assert [call.path for call in tree.roots[1].walk()] == [(1,), (1, 0), (1, 0, 0), (1, 1), (1, 1, 0)]
    hooks = nn.modules.module
    assert not hooks._global_forward_hooks
    assert not hooks._global_forward_pre_hooks
    assert not hooks._global_forward_hooks_always_called
    assert not hooks._global_forward_hooks_with_kwargs  # torch's own removal leaves an entry there


def test_buffers_of_every_module_called_are_seen_even_if_it_is_no_part_of_its_caller() -> None:
    hidden = nn.BatchNorm1d(2).double()  # not a submodule: its caller holds it in a list

    class Caller(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.helpers = mlp(3, 2), [hidden]

        def forward(self, x: Tensor) -> Tensor:
            return self.helpers[0](self.net(x))

    model, frozen = Caller(), nn.BatchNorm1d(3).double().requires_grad_(False)
    before = hidden.running_mean.clone(), frozen.running_mean.clone()
    with tree_for(model) as tree:
        model(frozen(randn(5, 3)))
    assert not torch.equal(hidden.running_mean, before[0])
    tree.buffers.restore()
    assert torch.equal(hidden.running_mean, before[0])
    assert torch.equal(frozen.running_mean, before[1])


def test_buffer_states() -> None:
    norm = nn.BatchNorm1d(2)
    states = BufferStates()
    states.see(norm)
    assert states.finite()
    norm(torch.full((3, 2), float("inf")))
    assert not states.finite()
    now, version = states.now(), norm.running_mean._version
    states.restore()
    assert norm.running_mean._version == version  # unseen by autograd
    assert states.finite()
    assert int(norm.num_batches_tracked) == 0
    now.restore()
    assert int(norm.num_batches_tracked) == 1


def test_owners_of_tied_parameters() -> None:
    model = make("tied_tokens").model
    owners = Owners(ParameterVector([model.embed.weight]))
    assert model in owners
    assert model.head in owners
    assert model.mix not in owners
