"""The step as the mathematics has it: dense matrices in float64, no closure and no conjugate gradients.

For the mean squared error of a small network, G = 2/(N·C)·JᵀJ, and a step solves (G + (λ + w)I) s = −(g + w·θ).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

import hessfree
from tests.lightning.modules import network

Batch = tuple[Tensor, Tensor]
DOUBLE = torch.float64
BATCHES, SIZE, DAMPING = 4, 8, 0.1


def newton(parameters: Any, **changes: Any) -> hessfree.HessianFree:
    """An optimizer that solves its system to the end, so that a dense solve is its reference."""
    solver = hessfree.CG(max_iterations=200, tolerance=1e-13)
    fixed = {"damping_rule": hessfree.ConstantDamping(), "preconditioner": hessfree.Identity()}
    return hessfree.HessianFree(parameters, damping=DAMPING, solver=solver, **(fixed | changes))


@dataclasses.dataclass
class Reference:
    """A network whose parameters are stepped by hand.

    Attributes:
        net: Never changed.
        damping: λ.
        theta: The parameters, in float64.
    """

    net: nn.Module
    damping: float = 0.1
    theta: Tensor = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self.net = self.net.to(DOUBLE)
        self.theta = torch.cat([p.detach().flatten() for p in self.net.parameters()])

    def outputs(self, theta: Tensor, x: Tensor) -> Tensor:
        shapes = {name: p.shape for name, p in self.net.named_parameters()}
        pieces = theta.split([shape.numel() for shape in shapes.values()])
        state = {name: piece.view(shapes[name]) for name, piece in zip(shapes, pieces, strict=True)}
        return functional_call(self.net, state, x.to(DOUBLE))

    def gradient(self, batches: Sequence[Batch]) -> Tensor:
        """Of the mean of the batches' losses."""

        def loss(theta: Tensor) -> Tensor:
            return torch.stack([(self.outputs(theta, x) - y.to(DOUBLE)).square().mean() for x, y in batches]).mean()

        return torch.autograd.functional.jacobian(loss, self.theta)

    def curvature(self, batch: Batch) -> Tensor:
        jacobian = torch.autograd.functional.jacobian(lambda t: self.outputs(t, batch[0]).flatten(), self.theta)
        return 2 / len(jacobian) * jacobian.T @ jacobian

    def step(
        self,
        *batches: Batch,
        lr: float = 1.0,
        change: Callable[[Tensor], Tensor] = lambda g: g,
        only: slice | None = None,
        whole: bool = False,
    ) -> Tensor:
        """Step with the mean gradient of `batches` and the curvature of the last of them.

        Args:
            batches: Micro-batches, or those of several processes.
            lr: Step length.
            change: What clipping does to the gradient.
            only: The part of the parameters that moves.
            whole: Take the mean curvature of all batches.

        Returns:
            The parameters after it.
        """
        part = slice(None) if only is None else only
        gradient = change(self.gradient(batches)[part])
        seen = batches if whole else batches[-1:]
        curvature = torch.stack([self.curvature(batch) for batch in seen]).mean(0)[part, part]
        shifted = curvature + self.damping * torch.eye(len(curvature), dtype=DOUBLE)
        self.theta = self.theta.clone()
        self.theta[part] -= lr * torch.linalg.solve(shifted, gradient)
        return self.theta


def deviation(found: Tensor, reference: Reference) -> float:
    """Return the error of the parameters, relative to how far the reference went."""
    way = reference.theta - Reference(network()).theta
    return float((found.to(DOUBLE) - reference.theta).norm() / way.norm())
