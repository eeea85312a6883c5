"""Fixed buffers: the same numbers, and nobody else's."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from hessfree.linearization.traced import TraceCache, program
from tests.architectures import DOUBLE, mlp, randn
from tests.linearization.traced.recorder import both, both_of, disagreement, parameters_of, record_call
from tests.linearization.traced.test_architectures import Images, Words

MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "perceptron": (lambda: mlp(3, 8, 8, 8, 2, activation=nn.SELU), lambda: randn(9, 3)),
    "residual": (lambda: Residual(), lambda: randn(5, 4)),
    "images": (lambda: Images(nn.BatchNorm2d), lambda: randn(4, 2, 6, 6)),
    "words": (lambda: Words(), lambda: torch.tensor([[1, 2, 3, 0, 5]])),
    "attention": (
        lambda: nn.TransformerEncoderLayer(8, 2, 12, dropout=0.1, batch_first=True),
        lambda: randn(3, 5, 8),
    ),
}


class Residual(nn.Module):
    """Products of a tensor with its own transpose, and views of views that outlive each other."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.first(x)
        gram = h.T @ h
        g = h + self.second(h.tanh()) @ (gram * gram.T) - h[:, :1] * h
        halves = g.chunk(2, 1)
        return torch.cat([halves[1], -halves[0]], 1).flip(0), gram.diagonal()


@pytest.mark.parametrize("name", MODELS)
def test_same_numbers_as_the_operators(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = MODELS[name][0]().to(DOUBLE)
    call, parameters = record_call(model, MODELS[name][1]()), parameters_of(model)
    replayed, graph = both_of(call, call.outputs, parameters)
    monkeypatch.setattr(program, "LARGEST_REPLAY", -1)
    plain, _ = both_of(call, call.outputs, parameters, TraceCache())
    assert replayed._trace.jvp.replays and not plain._trace.jvp.replays
    assert max(disagreement(replayed, graph), disagreement(plain, graph)) <= 1e-12
    for seed in range(3):
        v, u = randn(parameters.size, seed=seed), randn(graph.space.size, seed=seed)
        assert torch.allclose(replayed.jvp(v), plain.jvp(v), rtol=1e-13, atol=1e-13)
        assert torch.allclose(replayed.vjp(u), plain.vjp(u), rtol=1e-13, atol=1e-13)
        assert torch.allclose(replayed.gauss_newton(v, 0.5), plain.gauss_newton(v, 0.5), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("replays", [True, False])
def test_results_are_the_callers_own(replays: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not replays:
        monkeypatch.setattr(program, "LARGEST_REPLAY", -1)
    model = mlp(3, 4, 2)
    traced, _ = both(model, randn(5, 3))
    v, u = randn(parameters_of(model).size), randn(10)
    for product, argument in ((traced.jvp, v), (traced.vjp, u), (lambda t: traced.gauss_newton(t, 2.0), v)):
        kept, before = product(argument), argument.clone()
        copied = kept.clone()
        other = product(3 * argument)
        assert torch.equal(kept, copied)
        assert torch.equal(argument, before)
        other.zero_()
        assert torch.equal(product(argument), copied)
    assert torch.equal(traced.jvp(torch.zeros_like(v)), torch.zeros_like(u))


def test_outputs_that_no_parameter_moves() -> None:
    class Stopped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            z = self.layer(x)
            return z, (z.detach() + 0 * z.sum()).round() + z.sign()

    traced, graph = both(Stopped().to(DOUBLE), randn(4, 3))
    assert disagreement(traced, graph) <= 1e-12


def test_buffers_are_used_again() -> None:
    """A deep perceptron needs no more activations at once than a shallow one."""
    sizes = []
    for depth in (3, 12):
        model = mlp(*[16] * depth)
        traced, _ = both(model, randn(64, 16))
        traced.jvp(randn(parameters_of(model).size))
        replay = traced._trace.jvp._replay
        assert replay is not None
        held = {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
            for t in replay.run.__globals__.values()
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() != replay.input.data_ptr()
        }
        sizes.append(sum(held.values()) / (8 * 64 * 16))
    assert sizes[0] <= sizes[1] <= 3.01


@pytest.mark.parametrize("autocast", [True, False])
def test_products_keep_their_precision(autocast: bool) -> None:
    model = mlp(3, 4, 2).float()
    traced, graph = both(model, randn(5, 3).float())
    v = randn(parameters_of(model).size).float()
    jv, gv = graph.jvp(v), graph.vjp(graph.jvp(v))
    call = record_call(model, randn(5, 3).float())
    with torch.autocast("cpu", enabled=autocast):
        assert torch.allclose(traced.vjp(traced.jvp(v)), gv, rtol=1e-5, atol=1e-6)
        again, _ = both_of(call, call.outputs, parameters_of(model))
        assert torch.allclose(again.jvp(v), jv, rtol=1e-5, atol=1e-6)
