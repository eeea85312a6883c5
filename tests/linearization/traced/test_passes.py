"""What is left of a trace: as many kernels as one would write by hand."""

from __future__ import annotations

import collections

import pytest
import torch
from torch import Tensor, fx, nn

from hessfree.linearization.traced import TraceCache, TracedLinearization
from hessfree.linearization.traced.network import unwrapped
from hessfree.linearization.traced.trace import Trace
from tests.architectures import DOUBLE, mlp, randn
from tests.linearization.traced.recorder import both, disagreement, parameters_of, record_call

A = torch.ops.aten
VIEWS = {A.t.default, A.reshape.default, A.split_with_sizes.default, A.expand.default, A.permute.default}


def trace(model: nn.Module, *args: Tensor) -> Trace:
    call = record_call(model, *args)
    return TracedLinearization(call, call.outputs, parameters_of(model), TraceCache())._trace


def kernels(graph: fx.Graph) -> collections.Counter[str]:
    found = [n.target for n in graph.nodes if n.op == "call_function" and hasattr(n.target, "_schema")]
    return collections.Counter(str(target).split(".")[1] for target in found if target not in VIEWS)


@pytest.mark.parametrize("activation", [nn.SELU, nn.Tanh, nn.ReLU, nn.GELU, nn.SiLU])
@pytest.mark.parametrize("depth", [2, 4])
def test_a_perceptron_needs_its_matrix_products_and_a_factor_each(activation: type[nn.Module], depth: int) -> None:
    found = trace(mlp(*[5] * (depth + 1), activation=activation), randn(7, 5))
    inner = depth - 1
    # the mask of a ReLU is its output, which is kept anyway: a factor would be as large once more
    factor = "threshold_backward" if activation is nn.ReLU else "mul"
    assert kernels(found.jvp._part.graph) == {"addmm": depth + inner, factor: inner, "cat": 1}
    assert kernels(found.vjp._part.graph) == {"mm": depth + inner, "sum": depth, factor: inner, "cat": 1}


def test_of_a_relu_before_a_pool_a_mask_is_kept() -> None:
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(3, 2, 3)).to(DOUBLE)
    x = randn(2, 1, 10, 10)
    found = trace(model, x)
    for part in (found.jvp._part, found.vjp._part):
        large = [n for n in part.graph.nodes if n.op == "placeholder" and n.meta["shape"] == (2, 3, 8, 8)]
        assert [n.meta["dtype"] for n in large if n.name != "expand_default"] == [torch.bool]  # which takes no memory
    traced, graph = both(model, x)
    assert disagreement(traced, graph) <= 1e-12


def test_fixed_factors_are_multiplied_once() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Dropout(0.5), nn.Hardtanh(), nn.Linear(4, 2)).to(DOUBLE)
    found = trace(model, randn(5, 3))
    assert kernels(found.jvp._part.graph)["mul"] == kernels(found.vjp._part.graph)["mul"] == 1
    shared = set(found.jvp._part.residuals) & set(found.vjp._part.residuals)
    assert shared  # both maps multiply by the same residual


def test_biases_are_added_inside_the_products() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Conv2d(3, 2, 3)).to(DOUBLE)
    found = kernels(trace(model, randn(2, 2, 7, 7)).jvp._part.graph)
    assert found == {"convolution": 3, "add": 1, "mul": 1, "cat": 1}
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Tanh(), nn.Linear(4, 2)).to(DOUBLE)
    found = kernels(trace(model, randn(2, 5, 6, 3)).jvp._part.graph)
    assert found["addmm"] + found["mm"] == 3


@pytest.mark.parametrize("layer", [nn.SELU(), nn.ELU(0.7), nn.ELU()])
def test_exponential_units_in_single_precision(layer: nn.Module) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*[m for _ in range(6) for m in (nn.Linear(16, 16), layer)], nn.Linear(16, 4))
    x = torch.randn(32, 16)
    traced, graph = both(model, x)
    assert not any(n.target is A.elu.default for n in traced._trace._primal.__self__.graph.nodes)
    assert disagreement(traced, graph) <= 20 * torch.finfo(torch.float32).eps
    truth = model.double()(x.double()).detach().flatten()
    rounding = float((graph.outputs - truth).norm())
    assert float((traced.outputs - truth).norm()) <= 3 * rounding
    assert not torch.isnan(traced.outputs).any()


def test_units_at_their_limits() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.selu(self.scale * x)

    x = torch.tensor([-1e30, -100.0, -1e-20, 0.0, 1e-20, 50.0, 1e30])
    traced, graph = both(Bare(), x)
    assert torch.allclose(traced.outputs, graph.outputs, rtol=1e-6, atol=2e-7)


def test_draws_are_never_merged_or_dropped() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            torch.rand(2)  # drawn, and not used
            return self.layer(x + torch.rand_like(x) - torch.rand_like(x)) * (torch.randn_like(x.T).T + 3)

    model = Noisy().to(DOUBLE)
    torch.manual_seed(3)
    assert disagreement(*both(model, randn(4, 3))) <= 1e-14
    assert sum(kernels(trace(model, randn(4, 3))._primal.__self__.graph)[k] for k in ("rand", "rand_like")) == 3


def test_wrappers_are_seen_through() -> None:
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        inner = mlp(3, 4, 2)
        model = nn.parallel.DistributedDataParallel(inner)
        assert unwrapped(model) is inner
        cache = TraceCache()
        traced, graph = both(model, randn(5, 3), cache=cache)
        assert disagreement(traced, graph) <= 1e-14
        model(randn(5, 3)).sum().backward()  # its reducer was not disturbed
        both(inner, randn(5, 3), cache=cache)
        assert (cache.misses, cache.hits) == (1, 1)
    finally:
        torch.distributed.destroy_process_group()
