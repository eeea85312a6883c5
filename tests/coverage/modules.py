"""Modules that do what real ones do and `tests.architectures` has not: each is small, in float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from tests.architectures import mlp, randn


class UNet(nn.Module):
    """Down, up by interpolation and by a transposed convolution, with a skip connection and GroupNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.SiLU())
        self.down = nn.Sequential(nn.Conv2d(4, 6, 3, stride=2, padding=1), nn.GroupNorm(3, 6), nn.SiLU())
        self.up = nn.ConvTranspose2d(6, 4, 2, stride=2)
        self.leave = nn.Conv2d(8, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.enter(x)
        low = self.up(self.down(skip))
        low = low + F.interpolate(F.avg_pool2d(low, 2), scale_factor=2, mode="bilinear")
        return self.leave(torch.cat([low, skip], 1))


class CubeWithJvp(torch.autograd.Function):
    """x³ / 3 in the form that torch.func knows, with forward mode."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x**3 / 3

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return g * x**2

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return tangent * x**2


class Between(nn.Module):
    """Two linear layers and a function of (the module, the hidden layer) between them."""

    def __init__(self, function: Any, inner: int = 4, outer: int | None = None) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, inner), nn.Linear(outer or inner, 2)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.function(self, self.first(x)))


def zeroed_column(_: nn.Module, h: Tensor) -> Tensor:
    h = h.sin()
    h[:, 0] = 0
    h[1:, 2].mul_(3).sin_()
    return h


def masked(_: nn.Module, h: Tensor) -> Tensor:
    h = h.sin()
    h[h > 0.3] = 0.3
    h = h.masked_fill(h < -0.4, 1.0)
    return torch.where(h > 0, h.square(), h)


def selected(_: nn.Module, h: Tensor) -> Tensor:
    total = h.detach().sum(1)
    return h[total >= total.median()].tanh()


def spectrum(_: nn.Module, h: Tensor) -> Tensor:
    c = torch.fft.fft(h.tanh()) * torch.polar(torch.ones_like(h), h)
    return torch.fft.ifft(c).real + c.abs()


def straight_through(_: nn.Module, h: Tensor) -> Tensor:
    h = h.tanh()
    return h + (h.sign() - h).detach()


def until_small(_: nn.Module, h: Tensor) -> Tensor:
    while float(h.detach().norm()) > 1:
        h = 0.6 * h.tanh()
    return h


def implicit_steps(_: nn.Module, h: Tensor) -> Tensor:
    y = h
    for _ in range(4):
        y = y + 0.1 * torch.sin(y) * h
    return y


def distances(_: nn.Module, h: Tensor) -> Tensor:
    return h.tanh() + (h[:, None] - h[None]).square().sum(-1).add(1).sqrt().mean(1, keepdim=True)


class RunningScale(nn.Module):
    """Divides by a running norm that it updates at every call, and counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).tanh()
        self.calls += 1
        self.scale = self.scale.mul(0.9).add(x.norm(), alpha=0.1)
        return self.second(h / self.scale)


class Experts(nn.Module):
    """Routes each sample to the expert that a gate scores highest."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(3, 3)
        self.weights = nn.Parameter(randn(3, 3, 2))

    def forward(self, x: Tensor) -> Tensor:
        score, expert = self.gate(x).softmax(1).max(1)
        return score[:, None] * torch.einsum("ni,nio->no", x, self.weights[expert])


class Energy(nn.Module):
    """Returns the force -dE/dx of an energy network, as models of molecules do."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(3, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        return -torch.autograd.grad(self.net(x).sum(), x, create_graph=True)[0]


class Hypernetwork(nn.Module):
    """One network makes the weights of another."""

    def __init__(self) -> None:
        super().__init__()
        self.maker, self.made = nn.Linear(2, 8), nn.Linear(3, 2)
        self.made.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.maker(x[0, :2]).tanh()
        state = {"weight": weights[:6].view(2, 3), "bias": weights[6:]}
        return functional_call(self.made, state, (x,))


class Bag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(7, 3, mode="sum"), nn.Linear(3, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.bag(tokens).tanh())


class Listed(nn.Module):
    """Its weights stand in a ParameterList and a ParameterDict."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(randn(3, 4)), nn.Parameter(randn(4, 2, seed=5))])
        self.extra = nn.ParameterDict({"bias": nn.Parameter(randn(2, seed=6))})

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.weights[0]).tanh() @ self.weights[1] + self.extra["bias"]


class Sampled(nn.Module):
    """Reads its features at places that it learns."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.places = nn.Conv2d(1, 2, 3, padding=1), nn.Parameter(0.4 * randn(1, 2, 3, 2))

    def forward(self, x: Tensor) -> Tensor:
        grid = self.places.tanh().expand(len(x), -1, -1, -1)
        return F.grid_sample(self.conv(x).tanh(), grid, align_corners=False)


class Hidden(nn.Module):
    """Clips with an operator whose second derivative torch does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.hardsigmoid(self.first(x)))
