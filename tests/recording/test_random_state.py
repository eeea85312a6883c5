"""Random generators taken down and put back."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from hessfree.recording import BackwardCounter, RandomState
from hessfree.recording.random_state import GeneratorStates
from tests.architectures import mlp, randn


def draws() -> list[float]:
    return [float(torch.rand(())), random.random(), float(np.random.rand()), float(np.random.normal())]


def test_every_global_generator_is_put_back() -> None:
    state = RandomState.capture(torch.device("cpu"))
    first = draws()
    assert draws() != first
    state.restore()
    assert draws() == first
    state.restore()  # a second time, too
    assert draws() == first


def test_numpy_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.delitem(sys.modules, "numpy")
    state = RandomState.capture(torch.device("cpu"))
    assert state.numpy is None
    state.restore()


def test_generators_are_taken_down_at_first_sight() -> None:
    states, g = GeneratorStates(), torch.Generator().manual_seed(3)
    states.see(g)
    first = torch.rand(3, generator=g)
    states.see(g)
    after = states.now()
    states.restore()
    assert torch.equal(torch.rand(3, generator=g), first)
    torch.rand(3, generator=g)
    after.restore()
    second = torch.rand(3, generator=g)
    states.restore()
    assert torch.equal(torch.rand(6, generator=g)[3:], second)


def test_the_counter_of_backward_passes() -> None:
    net, counter = mlp(3, 2), BackwardCounter()
    counter.watch(list(net.parameters()))
    for _ in range(3):
        net(randn(4, 3)).sum().backward()
    net[0].bias.sum().backward()
    assert (counter.highest(), counter.total) == (4, 7)
    counter.reset()
    assert (counter.highest(), counter.total) == (0, 7)
    torch.autograd.grad(net(randn(4, 3)).sum(), list(net.parameters()))
    assert counter.total == 7  # nothing was accumulated
    counter.close()
    net(randn(4, 3)).sum().backward()
    assert counter.total == 7
