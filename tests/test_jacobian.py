"""Jacobians in the input against a double loop of torch.autograd.grad in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from experiments.models import ToyMLP
from hessfree.jacobian import batch_jacobian, batch_jvp, batch_vjp, divergence, hutchinson_divergence
from tests import oracle


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def error(found: Tensor, true: Tensor) -> float:
    return oracle.error(found.detach(), true.detach())


def double_loop(function: Callable[..., Tensor], x: Tensor, *others: Any) -> Tensor:
    """Return [B, D', D], one reverse pass an output of a sample."""
    x = x.detach().requires_grad_()
    z = function(x, *others)
    rows = [torch.autograd.grad(one, x, retain_graph=True)[0][b] for b, sample in enumerate(z) for one in sample]
    return torch.stack(rows).reshape(*z.shape, x.shape[-1])


class Attention(nn.Module):
    """Mixes the entries of one sample, and uses fused attention."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 6)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.inner(x.unflatten(1, (3, 2))).chunk(3, -1)
        return nn.functional.scaled_dot_product_attention(q, k, v).flatten(1)


def field(dim: int, out_dim: int) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    return ToyMLP(dim, out_dim, w=8, time_varying=True).double(), randn(4, dim), torch.rand(4, 1).double()


@pytest.mark.parametrize("mode", ["auto", "forward", "reverse"])
@pytest.mark.parametrize("chunk_size", [None, 1, 3])
@pytest.mark.parametrize(("dim", "out_dim"), [(5, 3), (2, 7), (4, 4)])
def test_equals_the_double_loop(dim: int, out_dim: int, chunk_size: int | None, mode: Any) -> None:
    net, x, t = field(dim, out_dim)
    found = batch_jacobian(net, x, t, mode=mode, chunk_size=chunk_size)
    assert found.shape == (4, out_dim, dim)
    assert error(found, double_loop(net, x, t)) <= 1e-13
    once = batch_jacobian(net, x, 0.3, mode=mode)
    assert error(once, double_loop(net, x, 0.3)) <= 1e-13
    assert error(batch_jacobian(net, x, torch.tensor(0.3), mode=mode), once) <= 1e-7


@pytest.mark.parametrize("mode", ["forward", "reverse"])
def test_fused_attention_and_convolutions(mode: Any) -> None:
    torch.manual_seed(0)
    net, x = Attention().double(), randn(3, 6)
    assert error(batch_jacobian(net, x, mode=mode), double_loop(net, x)) <= 1e-13
    conv = nn.Sequential(nn.Conv2d(1, 2, 2), nn.Tanh(), nn.BatchNorm2d(2).eval()).double()
    images = randn(2, 1, 3, 3)
    found = batch_jacobian(conv, images, mode=mode)
    assert found.shape == (2, 2, 2, 2, 1, 3, 3)
    flat = double_loop(lambda x: conv(x.reshape(-1, 1, 3, 3)).flatten(1), images.flatten(1))
    assert error(found.reshape(flat.shape), flat) <= 1e-13


@pytest.mark.parametrize(("dim", "out_dim"), [(5, 3), (2, 7)])
def test_products(dim: int, out_dim: int) -> None:
    net, x, t = field(dim, out_dim)
    dense, z = double_loop(net, x, t), net(x, t)
    u, v = randn(4, out_dim, seed=1), randn(4, dim, seed=2)
    for mode in ("auto", "forward", "reverse"):
        value, jv = batch_jvp(net, x, v, t, mode=mode)  # type: ignore[arg-type]
        assert error(value, z) <= 1e-14 and error(jv, torch.einsum("bij,bj->bi", dense, v)) <= 1e-13
    value, pulled = batch_vjp(net, x, u, t)
    assert error(value, z) <= 1e-14 and error(pulled, torch.einsum("bij,bi->bj", dense, u)) <= 1e-13


def test_divergence() -> None:
    net, x, t = field(4, 4)
    dense = double_loop(net, x, t)
    true = dense.diagonal(dim1=1, dim2=2).sum(1)
    for chunk_size in (None, 3):
        value, found = divergence(net, x, t, chunk_size=chunk_size)
        assert error(value, net(x, t)) <= 1e-14 and error(found, true) <= 1e-13
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * 4)  # every noise there is
    estimates = torch.stack([hutchinson_divergence(net, x, one.expand(4, 4), t)[1] for one in signs])
    assert error(estimates.mean(0), true) <= 1e-13
    symmetric = dense + dense.mT
    variance = symmetric.square().triu(1).sum((1, 2))
    assert error(estimates.var(0, correction=0), variance) <= 1e-12


def test_the_graph_reaches_the_parameters() -> None:
    net, x, t = field(3, 3)
    loop, ours = [], []
    for found, function in ((loop, divergence_by_loop), (ours, lambda *a: divergence(*a)[1])):
        found += torch.autograd.grad(function(net, x, t).square().sum(), list(net.parameters())[:-1], allow_unused=True)
    for one, true in zip(ours, loop, strict=True):
        assert (one is None) == (true is None)
        assert one is None or error(one, true) <= 1e-12
    with torch.no_grad():
        assert not batch_jacobian(net, x, t).requires_grad


def divergence_by_loop(net: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    z = net(x, t)
    columns = [torch.autograd.grad(z[:, i].sum(), x, create_graph=True)[0][:, i] for i in range(x.shape[1])]
    return torch.stack(columns).sum(0)


def test_no_samples() -> None:
    net, x, t = field(3, 2)
    assert batch_jacobian(net, x[:0], t[:0]).shape == (0, 2, 3)


def test_layers_that_mix_samples_are_not_differentiated_wrongly() -> None:
    net = nn.Sequential(nn.Unflatten(1, (3, 1)), nn.BatchNorm1d(3), nn.Flatten()).double()
    with pytest.raises((ValueError, RuntimeError), match="more than 1 value per channel|mutate a captured Tensor"):
        divergence(net, randn(4, 3))
    with pytest.raises((ValueError, RuntimeError), match="more than 1 value per channel|mutate a captured Tensor"):
        batch_jacobian(net, randn(4, 3))
    assert int(net[1].num_batches_tracked) == 0 and float(net[1].running_mean.abs().max()) == 0
    assert batch_jacobian(lambda x: x - x.mean(0), randn(4, 3)).abs().max() == 0  # a sample is its own mean


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda f, x: batch_jacobian(f, x, mode="sideways"), "sideways"),
        (lambda f, x: batch_jacobian(f, x, chunk_size=0), "chunk_size=0"),
        (lambda f, x: batch_jacobian(f, x[0]), r"\[3\]: give floating-point numbers \[B, D\]"),
        (lambda f, x: batch_jacobian(f, x.long()), "int64"),
        (lambda f, x: batch_jacobian(lambda x, t: x, x, x[:2]), "argument 1 after the inputs"),
        (lambda f, x: batch_jacobian(lambda x: x.sum(), x), "keeps the batch's rows"),
        (lambda f, x: batch_jvp(f, x, x[:, :2]), r"v has shape \[4, 2\]"),
        (lambda f, x: batch_vjp(f, x, x[:2]), r"u has shape \[2, 3\]"),
        (lambda f, x: divergence(lambda x: x[:, :2], x), r"output has shape \[2\]"),
        (lambda f, x: hutchinson_divergence(f, x, x[:2]), "noise has shape"),
    ],
)
def test_input_that_makes_no_sense(call: Callable[..., Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call(nn.Tanh(), randn(4, 3))
