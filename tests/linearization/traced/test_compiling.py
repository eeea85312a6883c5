"""Traces handed to torch.compile: the same products, and the plain trace where compilation fails."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from hessfree.linearization.traced import TraceCache
from hessfree.recording import twice_differentiable
from tests.architectures import mlp, randn
from tests.linearization.traced.recorder import both, disagreement


class Compiler:
    """Stands in for torch.compile: counts what it is given, and returns it, or what `change` makes of it."""

    def __init__(self, change: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda f: f) -> None:
        self.calls = 0
        self._change = change

    def __call__(self, function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        self.calls += 1
        return self._change(function)


def refuse(function: Callable[..., Any]) -> Callable[..., Any]:
    def run(*tensors: Any) -> Any:
        raise RuntimeError("no C++ compiler was found\nand much more")

    return run


def spoil(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *tensors: 1.001 * function(*tensors)


def test_the_real_compiler_gives_the_same_products_and_is_asked_once() -> None:
    from torch._dynamo.utils import counters  # not at the top: the other tests run without it

    counters.clear()
    model, cache = mlp(3, 4, 2), TraceCache(compile=True)
    with twice_differentiable():  # as in a step, where compiled modules of the user's run eagerly
        traced, graph = both(model, randn(5, 3), cache=cache)
        assert disagreement(traced, graph) <= 1e-12
    assert cache.compiles and not traced._trace.jvp.replays
    assert counters["stats"]["unique_graphs"] == 3
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.1)
    with twice_differentiable():
        again, graph = both(model, randn(5, 3, seed=1), cache=cache)
        assert again._trace is traced._trace
        assert disagreement(again, graph) <= 1e-12
    assert counters["stats"]["unique_graphs"] == 3


def test_both_maps_and_the_primal_are_compiled_once_a_signature(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = Compiler()
    monkeypatch.setattr(torch, "compile", compiler)
    model, cache = mlp(3, 4, 2), TraceCache(compile=True)
    for samples, expected in ((5, 3), (5, 3), (4, 6), (5, 6)):
        traced, graph = both(model, randn(samples, 3), cache=cache)
        assert disagreement(traced, graph) <= 1e-12
        assert compiler.calls == expected
    both(nn.Sequential(nn.Linear(3, 4), nn.Dropout(), nn.Linear(4, 2)).double(), randn(5, 3), cache=cache)
    assert compiler.calls == 8  # compiled code would draw other masks


@pytest.mark.parametrize(
    ("change", "reason"), [(refuse, "RuntimeError: no C.. compiler was found\\. The"), (spoil, "other numbers")]
)
def test_what_cannot_be_compiled_runs_as_it_is(
    change: Callable[..., Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = Compiler(change)
    monkeypatch.setattr(torch, "compile", compiler)
    model, cache = mlp(3, 4, 2), TraceCache(compile=True)
    with pytest.warns(UserWarning, match=f"compile=True is not used: .*{reason}"):
        traced, graph = both(model, randn(5, 3), cache=cache)
    assert disagreement(traced, graph) <= 1e-12
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other, graph = both(model, randn(4, 3), cache=cache)
    assert disagreement(other, graph) <= 1e-12
    assert compiler.calls == 1 and not cache.compiles


def test_where_only_the_second_map_fails_neither_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    functions = iter([lambda f: f, refuse])
    monkeypatch.setattr(torch, "compile", Compiler(lambda f: next(functions)(f)))
    with pytest.warns(UserWarning, match="compile=True is not used"):
        traced, graph = both(mlp(3, 4, 2), randn(5, 3), cache=TraceCache(compile=True))
    assert traced._trace.jvp.replays and traced._trace.vjp.replays
    assert disagreement(traced, graph) <= 1e-12


def test_a_copy_goes_on_to_compile() -> None:
    cache = TraceCache(capacity=3, compile=True)
    for copied in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        assert (copied.capacity, copied.compiles, len(copied)) == (3, True, 0)
