"""Record one call, and linearise it both ways."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from hessfree.linearization import GraphLinearization
from hessfree.linearization.traced import TraceCache, TracedLinearization
from hessfree.recording import Call, CallTree, Output, Owners, twice_differentiable
from hessfree.vectors import ParameterVector
from tests.oracle import error


def parameters_of(model: nn.Module) -> ParameterVector:
    return ParameterVector([p for p in model.parameters() if p.requires_grad])


def record_call(model: nn.Module, *args: Any, **kwargs: Any) -> Call:
    """Call `model` once, as a closure does."""
    parameters = parameters_of(model)
    tree = CallTree(Owners(parameters), parameters.device, lambda _: False, lambda _: True)
    with torch.enable_grad(), twice_differentiable(), tree:
        model(*args, **kwargs)
    return tree.roots[0]


def both(
    model: nn.Module, *args: Any, cache: TraceCache | None = None, **kwargs: Any
) -> tuple[TracedLinearization, GraphLinearization]:
    """Linearise one call of `model` by a trace, and by the graph of the same call."""
    call, parameters = record_call(model, *args, **kwargs), parameters_of(model)
    return both_of(call, call.outputs, parameters, cache)


def both_of(
    call: Call, outputs: tuple[Output, ...], parameters: ParameterVector, cache: TraceCache | None = None
) -> tuple[TracedLinearization, GraphLinearization]:
    cache = TraceCache() if cache is None else cache
    return TracedLinearization(call, outputs, parameters, cache), GraphLinearization(outputs, parameters)


def disagreement(traced: TracedLinearization, graph: GraphLinearization, seed: int = 0) -> float:
    """Return the largest relative error of z and of every product; each product is made twice."""
    generator = torch.Generator().manual_seed(seed)
    size = graph.vjp(graph.space.zeros()).numel()
    v = torch.randn(size, generator=generator, dtype=torch.float64).to(graph.space.dtype)
    u = torch.randn(graph.space.size, generator=generator, dtype=torch.float64).to(graph.space.dtype)
    rows = torch.stack([u, 2 * u.flip(0)])
    assert traced.space.shapes == graph.space.shapes
    found = [error(traced.outputs, graph.outputs)]
    for _ in range(2):
        found += [error(traced.jvp(v), graph.jvp(v)), error(traced.vjp(u), graph.vjp(u))]
        found += [error(traced.gauss_newton(v, u), graph.vjp(u * graph.jvp(v)))]
    return max(*found, error(traced.vjps(rows), graph.vjps(rows)))
