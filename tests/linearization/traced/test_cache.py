"""One trace a signature, and none a step."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import Tensor, nn

from hessfree import HessianFree, Identity
from hessfree.linearization import LinearizationError
from hessfree.linearization.traced import TraceCache
from tests.architectures import DOUBLE, mlp, randn
from tests.linearization.traced.recorder import both, disagreement, parameters_of


def test_new_parameters_and_batches_trace_nothing() -> None:
    model, cache = mlp(3, 4, 2), TraceCache()
    for step in range(4):
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.1)
        assert disagreement(*both(model, randn(5, 3, seed=step), cache=cache), seed=step) <= 1e-12
    assert (cache.misses, cache.hits, len(cache)) == (1, 3, 1)


def test_parameters_that_were_replaced() -> None:
    model, cache = mlp(3, 4, 2), TraceCache()
    both(model, randn(5, 3), cache=cache)
    model[0].weight = nn.Parameter(randn(4, 3))
    assert disagreement(*both(model, randn(5, 3), cache=cache)) <= 1e-12
    assert cache.misses == 1


def test_a_last_smaller_batch_costs_one_trace() -> None:
    model, cache = mlp(3, 4, 2), TraceCache()
    for _ in range(3):
        for rows in (5, 5, 2):
            assert disagreement(*both(model, randn(rows, 3), cache=cache)) <= 1e-12
    assert (cache.misses, cache.hits, cache.evictions) == (2, 7, 0)


def test_an_epoch_of_the_optimizer_with_a_last_smaller_batch_traces_twice() -> None:
    torch.manual_seed(0)
    model = mlp(3, 4, 2)
    optimizer = HessianFree(model.parameters(), preconditioner=Identity(), linearization="traced")
    for _ in range(3):
        for rows in (5, 5, 2):
            x, y = randn(rows, 3), randn(rows, 2, seed=3)
            optimizer.step(lambda x=x, y=y: nn.functional.mse_loss(model(x), y))
    traces = optimizer._builder._traces
    assert (traces.misses, traces.hits, traces.evictions) == (2, 7, 0)


def test_the_least_recently_used_is_thrown_away() -> None:
    model, cache = mlp(3, 4, 2), TraceCache(capacity=2)
    for rows in (1, 2, 1, 3, 1, 2):  # 3 throws away 2, and 2 throws away 3
        both(model, randn(rows, 3), cache=cache)
    assert (cache.misses, cache.hits, cache.evictions, len(cache)) == (4, 2, 2, 2)
    with pytest.raises(ValueError, match="capacity=0"):
        TraceCache(0)


class Switched(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)
        self.norm = nn.BatchNorm1d(4)
        self.stopped, self.slope = False, 0.1
        self.mask = torch.ones(4, dtype=DOUBLE)

    def forward(self, x: Tensor) -> Tensor:
        h = nn.functional.leaky_relu(self.norm(self.first(x)), self.slope) * self.mask
        return self.second(h.detach() if self.stopped else h)


def test_every_switch_is_seen() -> None:
    torch.manual_seed(0)
    model, cache, x = Switched().to(DOUBLE), TraceCache(capacity=20), randn(6, 3)

    def misses() -> int:
        before = cache.misses
        assert disagreement(*both(model, x, cache=cache)) <= 1e-12
        return cache.misses - before

    assert (misses(), misses()) == (1, 0)
    model.eval()
    assert (misses(), misses()) == (1, 0)
    model.stopped = True  # the outputs stay, the Jacobian does not
    assert (misses(), misses()) == (1, 0)
    model.slope = 0.3
    assert (misses(), misses()) == (1, 0)
    model.second.bias.requires_grad_(False)
    assert (misses(), misses()) == (1, 0)
    x = randn(3, 6).T
    assert (misses(), misses()) == (1, 0)
    model.second = nn.Linear(4, 2, dtype=DOUBLE)
    assert (misses(), misses()) == (1, 0)
    model.mask = 2 * model.mask
    assert (misses(), misses()) == (1, 0)
    model.mask[0] = 0
    assert (misses(), misses()) == (1, 0)


def test_arguments_that_were_one_tensor_may_be_two() -> None:
    class Pairs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.layer(x) * self.layer(y).tanh()

    model, cache, x = Pairs().to(DOUBLE), TraceCache(), randn(4, 3)
    for y in (x, randn(4, 3, seed=2), x):
        assert disagreement(*both(model, x, y, cache=cache)) <= 1e-12
    assert cache.misses == 1


def test_two_that_live_at_once() -> None:
    model, cache = mlp(3, 4, 2), TraceCache()
    first, of_first = both(model, randn(5, 3, seed=1), cache=cache)
    second, of_second = both(model, randn(5, 3, seed=2), cache=cache)
    assert disagreement(first, of_first) <= 1e-12
    assert disagreement(second, of_second) <= 1e-12
    assert disagreement(first, of_first) <= 1e-12


def test_a_signature_that_is_always_new() -> None:
    model, cache = mlp(3, 4, 2), TraceCache(capacity=2)
    for rows in range(1, 9):
        both(model, randn(rows, 3), cache=cache)
    with pytest.raises(LinearizationError, match="last 8 calls of Sequential differed"):
        both(model, randn(9, 3), cache=cache)
    both(model, randn(8, 3), cache=cache)  # one that is known is used,
    both(model, randn(9, 3), cache=cache)  # and then there is hope again


def test_faults_are_remembered() -> None:
    model, cache = mlp(3, 4, 2), TraceCache()
    traced, _ = both(model, randn(5, 3), cache=cache)
    assert not traced.trusted
    traced.accept()
    traced, _ = both(model, randn(5, 3), cache=cache)
    assert traced.trusted
    traced.reject("it rained")
    with pytest.raises(LinearizationError, match="it rained"):
        both(model, randn(5, 3), cache=cache)
    both(model, randn(4, 3), cache=cache)


def test_modules_and_batches_are_not_kept_alive() -> None:
    model, cache = mlp(3, 4, 2), TraceCache()
    x = randn(5, 3)
    traced, graph = both(model, x, cache=cache)
    disagreement(traced, graph)
    alive = [weakref.ref(model), weakref.ref(x), weakref.ref(next(model.parameters()))]
    del traced, graph, model, x
    gc.collect()
    assert [ref() for ref in alive] == [None, None, None]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))])
def test_copies_are_empty(copied: object) -> None:
    cache = TraceCache(capacity=3)
    both(mlp(3, 4, 2), randn(5, 3), cache=cache)
    other = copied(cache)  # type: ignore[operator]
    assert (len(other), other.capacity, other.misses) == (0, 3, 0)
    both(mlp(3, 4, 2), randn(5, 3), cache=other)
    assert len(other) == 1


def test_parameters_in_another_order() -> None:
    torch.manual_seed(0)
    model, cache = mlp(3, 3, 3), TraceCache()
    both(model, randn(5, 3), cache=cache)
    model[0], model[2] = model[2], model[0]
    assert parameters_of(model).size == 24
    assert disagreement(*both(model, randn(5, 3), cache=cache)) <= 1e-12
