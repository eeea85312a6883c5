"""Workloads of a few samples, and their dense Gauss-Newton matrices in float64."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call

from experiments.benchmark.products.networks import ConvNet, Transformer
from experiments.benchmark.products.workloads import Workload
from experiments.models import ToyMLP


def perceptron() -> Workload:
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2))
    return Workload("perceptron", "a perceptron", model, nn.MSELoss(), torch.randn(6, 3), torch.randn(6, 2))


def toy() -> Workload:
    return Workload("toy", "a ToyMLP", ToyMLP(3, w=4), nn.MSELoss(), torch.randn(5, 3), torch.randn(5, 3))


def convolutions() -> Workload:
    model, targets = ConvNet(channels=(2, 3), side=8, classes=3), torch.randint(3, (4,))
    return Workload("conv", "a conv net", model, nn.CrossEntropyLoss(), torch.randn(4, 3, 8, 8), targets)


def transformer() -> Workload:
    model = Transformer(width=8, layers=2, heads=2, vocabulary=5, length=3)
    tokens, targets = torch.randint(5, (2, 3)), torch.randint(5, (6,))
    return Workload("transformer", "a transformer", model, nn.CrossEntropyLoss(), tokens, targets)


def normalised() -> Workload:
    norm = nn.BatchNorm2d(4, track_running_stats=False)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
    targets = torch.randint(3, (6,))
    return Workload("norm", "BatchNorm", model, nn.CrossEntropyLoss(), torch.randn(6, 3, 4, 4), targets)


WORKLOADS = {make.__name__: make for make in (perceptron, toy, convolutions, transformer, normalised)}


def make(name: str) -> Workload:
    torch.manual_seed(3)
    return WORKLOADS[name]()


def dense(workload: Workload) -> Tensor:
    """JᵀHJ `[P, P]` in float64, from Jacobians alone."""
    one = workload.double()
    sizes, shapes = [p.numel() for p in one.parameters], [p.shape for p in one.parameters]
    names = [name for name, _ in one.model.named_parameters()]

    def outputs(theta: Tensor) -> Tensor:
        pieces = [piece.view(shape) for piece, shape in zip(theta.split(sizes), shapes, strict=True)]
        return functional_call(one.model, dict(zip(names, pieces, strict=True)), (one.inputs,)).reshape(-1)

    theta = torch.cat([p.detach().reshape(-1) for p in one.parameters])
    z = outputs(theta)
    jacobian = torch.autograd.functional.jacobian(outputs, theta)
    shape = one.model(one.inputs).shape
    hessian = torch.autograd.functional.hessian(lambda z: one.loss(z.view(shape), one.targets), z)
    return jacobian.T @ hessian @ jacobian
