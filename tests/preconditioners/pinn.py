"""Physics-informed networks: their residual holds derivatives in the network's input."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor, nn

from hessfree import KFAC
from hessfree.curvature import Curvature, CurvatureBuilder
from hessfree.preconditioners import Sample
from hessfree.recording import CallTree, Owners, mark_outputs, record
from hessfree.vectors import ParameterVector

DOUBLE = torch.float64


@dataclasses.dataclass
class Poisson:
    """-Δu = f on the square, with u = 0 on its boundary; residuals of both, marked apart or as one."""

    net: nn.Module
    inside: Tensor
    boundary: Tensor
    together: bool = False

    def residuals(self) -> tuple[Tensor, ...]:
        x = self.inside.clone().requires_grad_()
        (du,) = torch.autograd.grad(self.net(x).sum(), x, create_graph=True)
        second = [torch.autograd.grad(du[:, i].sum(), x, create_graph=True)[0][:, i] for i in range(x.shape[1])]
        source = 2 * torch.pi**2 * torch.sin(torch.pi * x.detach()).prod(1)
        apart = -sum(second) - source, self.net(self.boundary)
        if not self.together:
            return apart
        return (torch.cat([(r / len(r) ** 0.5).reshape(-1) for r in apart]),)

    def loss(self) -> Tensor:
        marked = [mark_outputs(r) for r in self.residuals()]
        return marked[0].square().sum() if self.together else sum(r.square().mean() for r in marked)

    def closure(self) -> Tensor:
        self.net.zero_grad()
        loss = self.loss()
        loss.backward()
        return loss


def poisson(*widths: int, inside: int = 20, boundary: int = 8, together: bool = False) -> Poisson:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for i, o in zip(widths, widths[1:], strict=False):
        layers += [nn.Linear(i, o, dtype=DOUBLE), nn.Tanh()]
    edge = torch.rand(boundary, widths[0], dtype=DOUBLE)
    edge[:, 0] = edge[:, 0].round()
    return Poisson(nn.Sequential(*layers[:-1]), torch.rand(inside, widths[0], dtype=DOUBLE), edge, together)


def curvature_of(
    net: nn.Module, closure: Callable[[], Tensor], scale: float = 1.0, shift: float = 0.0
) -> tuple[Curvature, Sample]:
    """Return the curvature of a closure's loss, and what a preconditioner is shown of it."""
    params = ParameterVector(list(net.parameters()))
    builder = CurvatureBuilder(Owners(params), None, "graph", None, KFAC().taps)
    tree = CallTree(Owners(params), params.device, builder.keeps_inputs, builder.keeps_value)
    shifts = [shift] * len(params.params)
    curvature = builder.build(record(closure, params, tree), params, 0, lambda _: None, scale, shifts)
    assert curvature.sample is not None
    return curvature, curvature.sample()
