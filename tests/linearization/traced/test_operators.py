"""Operators with traps of their own: hidden dependence, strange strides, wrong batching rules, gradients inside."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from hessfree.linearization.traced import TraceCache
from tests.architectures import DOUBLE, randn
from tests.linearization.traced.recorder import both, both_of, disagreement, parameters_of, record_call


class Through(nn.Module):
    """A linear layer whose output goes through a function."""

    def __init__(self, function: Callable[[Through, Tensor], Tensor | tuple[Tensor, ...]]) -> None:
        super().__init__()
        self.layer, self.other = nn.Linear(4, 4), nn.Linear(4, 4)
        self.function = function

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        return self.function(self, x)


def spd(net: Through, x: Tensor) -> Tensor:
    h = net.layer(x)
    return h @ h.mT + 3 * torch.eye(len(x), dtype=x.dtype)


def energy(net: Through, x: Tensor) -> Tensor:
    y = x.detach().requires_grad_()
    return torch.autograd.grad(net.layer(y).tanh().square().sum(), y, create_graph=True)[0]


def per_sample(net: Through, x: Tensor) -> Tensor:
    return torch.func.vmap(torch.func.grad(lambda y: net.layer(y).tanh().square().sum()))(x)


def generated_weights(net: Through, x: Tensor) -> Tensor:
    return torch.func.functional_call(net.other, {"weight": net.layer(x)}, (x,))


FUNCTIONS: dict[str, Callable[[Through, Tensor], Tensor | tuple[Tensor, ...]]] = {
    "solve": lambda net, x: torch.linalg.solve(spd(net, x), x),
    "slogdet": lambda net, x: torch.linalg.slogdet(spd(net, x))[1][None],
    "cholesky": lambda net, x: torch.linalg.cholesky(spd(net, x)),
    "distances": lambda net, x: (-torch.cdist(net.layer(x), net.other(x).tanh()).square()).exp(),
    "fourier": lambda net, x: torch.fft.irfft(torch.fft.rfft(net.layer(x)) * (1 + 2j)),
    "modulus": lambda net, x: torch.fft.rfft(net.layer(x)).abs(),
    "order": lambda net, x: (net.layer(x).sort(1)[0], net.layer(x).topk(2, 1)[0], net.layer(x).cummax(1)[0]),
    "gather": lambda net, x: net.layer(x).gather(1, x.argsort(1)).scatter_add(1, x.argsort(1), net.other(x).tanh()),
    "where": lambda net, x: torch.where(x > 0, net.layer(x), net.other(x).exp()),
    "mask": lambda net, x: net.layer(x).masked_fill(x > 0, 0.0).tanh(),
    "strided": lambda net, x: net.layer(x).as_strided((3, 3, 2), (4, 1, 1)).tanh() * net.other(x)[:3, :3, None],
    "windows": lambda net, x: net.layer(x).unfold(1, 2, 1).tanh(),
    "statistics": lambda net, x: net.layer(x).std(0) + net.layer(x).logsumexp(1, True) + net.layer(x).cumprod(1),
    "energy": energy,
    "per_sample": per_sample,
    "generated_weights": generated_weights,
    "checkpoint": lambda net, x: checkpoint(lambda t: net.other(t).tanh(), net.layer(x).tanh(), use_reentrant=False),
    "gumbel": lambda net, x: F.gumbel_softmax(net.layer(x)),
    "rrelu": lambda net, x: F.rrelu(net.layer(x), training=True),
    "straight_through": lambda net, x: net.other((net.layer(x).round() - net.layer(x)).detach() + net.layer(x)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_operator(name: str) -> None:
    torch.manual_seed(0)
    model, cache = Through(FUNCTIONS[name]).to(DOUBLE), TraceCache()
    for step in range(2):
        with torch.no_grad():
            model.layer.weight.mul_(0.9)
        assert disagreement(*both(model, randn(4, 4, seed=step), cache=cache), seed=step) <= 1e-12
    assert cache.misses == 1


@pytest.mark.parametrize("wrap", [parametrizations.spectral_norm, parametrizations.orthogonal])
def test_parametrization(wrap: Callable[[nn.Module], nn.Module]) -> None:
    torch.manual_seed(0)
    model, cache = nn.Sequential(wrap(nn.Linear(4, 4)), nn.Tanh(), nn.Linear(4, 2)).to(DOUBLE), TraceCache()
    for step in range(3):
        before = [b.clone() for b in model.buffers()]
        call = record_call(model, randn(5, 4, seed=step))
        after = [b.clone() for b in model.buffers()]
        for buffer, value in zip(model.buffers(), before, strict=True):
            buffer.data.copy_(value)  # a power iteration goes on from where it stood before the call
        traced, graph = both_of(call, call.outputs, parameters_of(model), cache)
        for buffer, value in zip(model.buffers(), after, strict=True):
            buffer.data.copy_(value)
        assert disagreement(traced, graph) <= 1e-12  # what was kept of the buffers is a copy
    assert cache.misses == 1


def test_dropout_of_channels_that_lie_last() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Dropout(0.3), nn.Conv2d(4, 2, 3), nn.Flatten()).to(DOUBLE)
    model.to(memory_format=torch.channels_last)
    traced, graph = both(model, randn(2, 3, 6, 6).to(memory_format=torch.channels_last))
    assert disagreement(traced, graph) <= 1e-12
