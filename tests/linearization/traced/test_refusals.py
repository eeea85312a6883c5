"""What a trace would get wrong ends in an error that says why, and leaves nothing behind."""

from __future__ import annotations

import builtins
import dataclasses
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hessfree import HessianFree
from hessfree.linearization import LinearizationError, find_fault
from hessfree.linearization.traced import TraceCache, TracedLinearization
from tests.architectures import DOUBLE, mlp, randn
from tests.linearization.traced.recorder import both, both_of, parameters_of, record_call


class Network(nn.Module):
    """A linear layer, and something between its input or output and the world."""

    def __init__(self, function: Callable[[Network, Tensor], Tensor]) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.function = function
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


CONSTANT = randn(3)


def branches(net: Network, x: Tensor) -> Tensor:
    return net.layer(x) if x.sum() > 100 else net.layer(x).tanh()


def counts(net: Network, x: Tensor) -> Tensor:
    return net.layer(x).tanh() * x[x > 0].numel()


def selects(net: Network, x: Tensor) -> Tensor:
    h = net.layer(x)
    return h[x > 0].tanh()


def goes_through_numpy(net: Network, x: Tensor) -> Tensor:
    return net.layer(torch.from_numpy(np.sin(x.numpy())))


def goes_through_lists(net: Network, x: Tensor) -> Tensor:
    return net.layer(torch.tensor(x.tolist(), dtype=DOUBLE))


def uses_a_global(net: Network, x: Tensor) -> Tensor:
    return net.layer(x) * CONSTANT


def skips_at_random(net: Network, x: Tensor) -> Tensor:
    return net.layer(x).tanh() if random.random() < 0.5 else net.layer(x)


def skips_by_numpy(net: Network, x: Tensor) -> Tensor:
    return net.layer(x) * np.random.rand()


def draws_from_its_own(net: Network, x: Tensor) -> Tensor:
    return net.layer(x) + torch.randn(3, generator=torch.Generator().manual_seed(1), dtype=DOUBLE)


def writes_into_its_input(net: Network, x: Tensor) -> Tensor:
    return net.layer(x.mul_(2))


def cannot_be_differentiated_twice(net: Network, x: Tensor) -> Tensor:
    return nn.functional.hardsigmoid(net.layer(x))


REFUSED = {
    branches: "get value out of a tracing tensor",
    counts: "shape .* depends on the data",
    selects: "shape .* depends on the data",
    goes_through_numpy: "reads numbers out of its tensors",
    goes_through_lists: "reads numbers out of its tensors",
    uses_a_global: "neither parameter, buffer, input nor attribute",
    skips_at_random: "Python's or numpy's generator",
    skips_by_numpy: "Python's or numpy's generator",
    draws_from_its_own: "Generator",
    writes_into_its_input: "writes into its inputs",
    cannot_be_differentiated_twice: "hardsigmoid_backward is not implemented",
}


@pytest.mark.parametrize("function", REFUSED, ids=lambda f: f.__name__)
def test_refused_once_and_for_all(function: Callable[[Network, Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    model, cache = Network(function).to(DOUBLE), TraceCache()
    call = record_call(model, randn(4, 3))
    state, python, attributes = torch.get_rng_state(), random.getstate(), dict(model.__dict__)
    for misses in (1, 1):  # a second attempt would fail as the first did, and is not made
        with pytest.raises(LinearizationError, match=REFUSED[function]):
            TracedLinearization(call, call.outputs, parameters_of(model), cache)
        assert cache.misses == misses
    assert torch.equal(torch.get_rng_state(), state)
    assert random.getstate() == python
    assert model.__dict__ == attributes


@dataclasses.dataclass
class Settings:
    scale: float = 2.0


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor, settings: Any) -> Tensor:
        return self.layer(x) * settings.scale


def test_inputs_that_are_no_plain_values() -> None:
    with pytest.raises(LinearizationError, match="an input of Scaled is a Settings, neither tensor nor plain value"):
        both(Scaled().to(DOUBLE), randn(2, 3), Settings())


def test_inputs_that_may_depend_on_parameters() -> None:
    first, model = nn.Linear(3, 3).to(DOUBLE), mlp(3, 3, 2)
    with pytest.raises(LinearizationError, match="may depend on parameters"):
        both(model, first(randn(2, 3)))
    with pytest.raises(LinearizationError, match="may depend on parameters"):
        both(model, model[0].weight)


def test_inner_calls_whose_inputs_were_not_kept() -> None:
    model = nn.Sequential(mlp(3, 4, 2))
    inner = record_call(model, randn(2, 3)).children[0]
    with pytest.raises(LinearizationError, match="inputs of Sequential were not kept"):
        both_of(inner, inner.outputs, parameters_of(model))


def test_random_state_that_is_not_known() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)).to(DOUBLE)
    call = record_call(model, randn(2, 3))
    call.random = None
    with pytest.raises(LinearizationError, match="state before its call is not known"):
        both_of(call, call.outputs, parameters_of(model))


def test_a_network_that_is_another_at_every_call() -> None:
    """It is traced as it is now, and the comparison with what was recorded is the caller's to make."""

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.seen = nn.Linear(3, 3), [0]

        def forward(self, x: Tensor) -> Tensor:
            self.seen[0] += 1
            return self.layer(x) * self.seen[0]

    model = Counting().to(DOUBLE)
    call = record_call(model, randn(2, 3))
    try:
        traced, graph = both_of(call, call.outputs, parameters_of(model))
    except LinearizationError as error:
        assert "other outputs" in str(error)
    else:
        assert not torch.allclose(traced.outputs, graph.outputs)
        assert find_fault(traced, graph, parameters_of(model)) is not None


def _no_make_fx(monkeypatch: pytest.MonkeyPatch, raised: type[Exception]) -> None:
    importing = builtins.__import__

    def without(name: str, *args: Any) -> Any:
        if name == "torch.fx.experimental.proxy_tensor":
            raise raised("gone")
        return importing(name, *args)

    monkeypatch.setattr(builtins, "__import__", without)


@pytest.mark.parametrize("raised", [ImportError, AttributeError])
def test_a_torch_without_make_fx(monkeypatch: pytest.MonkeyPatch, raised: type[Exception]) -> None:
    model = mlp(3, 3, 2)
    call = record_call(model, randn(2, 3))
    _no_make_fx(monkeypatch, raised)
    with pytest.raises(LinearizationError, match="gone"):
        TracedLinearization(call, call.outputs, parameters_of(model), TraceCache())


@pytest.mark.parametrize("raised", [ImportError, AttributeError])
def test_steps_without_make_fx(monkeypatch: pytest.MonkeyPatch, raised: type[Exception]) -> None:
    """The autograd graph takes over unasked: it is slower, and as right."""
    model = mlp(3, 3, 2)
    optimizer, x, y = HessianFree(model.parameters()), randn(5, 3), randn(5, 2)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        return loss

    _no_make_fx(monkeypatch, raised)
    for _ in range(2):
        optimizer.step(closure)
        assert optimizer.last_step is not None
        assert optimizer.last_step.backend == "graph"


def test_passes_that_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*_: object) -> None:
        raise AttributeError("no such operator")

    model = mlp(3, 3, 2)
    call = record_call(model, randn(2, 3))
    monkeypatch.setattr("hessfree.linearization.traced.trace.clean", gone)
    with pytest.raises(LinearizationError, match="no such operator"):
        TracedLinearization(call, call.outputs, parameters_of(model), TraceCache())
