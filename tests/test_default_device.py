"""`torch.set_default_device("cuda")` is common in notebooks: nothing may be made on the default device by accident.

A default device without memory ("meta") finds on any machine what a CUDA default would: a tensor made there cannot be
computed with those on the CPU, where the parameters are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hessfree import (
    CG,
    KFAC,
    Armijo,
    AutoSolver,
    DenseCholesky,
    EmpiricalFisher,
    EmpiricalFisherDiagonal,
    GaussNewton,
    GramCholesky,
    Hessian,
    HessianFree,
    Identity,
    Jacobi,
    JacobianGram,
    LevenbergMarquardt,
    MonteCarloFisher,
    Nystrom,
    QuadraticModelMomentum,
    Woodbury,
    linearize,
)
from hessfree.jacobian import batch_jacobian, divergence, hutchinson_divergence
from tests.architectures import DOUBLE, Attention, ConvNet, classes, mlp, randn

Params = Iterable[nn.Parameter]
_TEST = LevenbergMarquardt(every=1)

RECIPES: dict[str, Callable[[Params], HessianFree]] = {
    "defaults": HessianFree,
    "stochastic": lambda p: HessianFree.stochastic(p, curvature_batch=8),
    "full batch": HessianFree.full_batch,
    "graph": lambda p: HessianFree(p, linearization="graph", damping_rule=_TEST),
    "linearize": lambda p: HessianFree(p, linearization="functional", damping_rule=_TEST),
    "micro-batches": lambda p: HessianFree(p, microbatch=5),
    "line search, momentum": lambda p: HessianFree(p, line_search=Armijo(), momentum=QuadraticModelMomentum()),
    "no preconditioner": lambda p: HessianFree(p, preconditioner=Identity()),
    "Jacobi": lambda p: HessianFree(p, preconditioner=Jacobi()),
    "empirical Fisher": lambda p: HessianFree(p, preconditioner=EmpiricalFisherDiagonal()),
    "Nyström": lambda p: HessianFree(p, preconditioner=Nystrom(rank=5)),
    "Woodbury": lambda p: HessianFree(p, preconditioner=Woodbury(samples=6)),
    "K-FAC to the power ½": lambda p: HessianFree(
        p, preconditioner=KFAC(power=0.5), solver=CG(max_iterations=1, every=2)
    ),
    "Gram": lambda p: HessianFree(p, solver=GramCholesky()),
    "dense": lambda p: HessianFree(p, solver=DenseCholesky()),
    "auto": lambda p: HessianFree(p, solver=AutoSolver()),
}


def _network(name: str) -> tuple[nn.Module, Tensor, Callable[[Tensor], Tensor]]:
    torch.manual_seed(0)
    if name == "convolutions":
        labels = classes(16, high=3)
        return ConvNet().to(DOUBLE).eval(), randn(16, 1, 5, 5), lambda z: F.cross_entropy(z, labels)
    if name == "attention":
        target = randn(16, 3, 2, seed=2)
        return Attention().to(DOUBLE), randn(16, 3, 4), lambda z: F.mse_loss(z, target)
    labels = randn(16, 3, seed=2)
    return mlp(4, 6, 3), randn(16, 4), lambda z: F.mse_loss(z, labels)


def _trained(network: str, recipe: str, default: str) -> Tensor:
    model, x, loss_of = _network(network)
    with torch.device(default):
        optimizer = RECIPES[recipe](model.parameters())

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(model(x))
            loss.backward()
            return loss

        for _ in range(3):
            optimizer.step(closure)
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


@pytest.mark.parametrize(
    ("network", "recipe"),
    [
        *(("mlp", recipe) for recipe in RECIPES),
        *(("convolutions", recipe) for recipe in ("defaults", "empirical Fisher", "Woodbury", "Gram")),
        *(("attention", recipe) for recipe in ("defaults", "graph", "Woodbury")),
    ],
)
def test_steps_are_the_same_under_any_default_device(network: str, recipe: str) -> None:
    expected = _trained(network, recipe, "cpu")
    found = _trained(network, recipe, "meta")
    assert found.device.type == "cpu"
    assert torch.equal(found, expected)


def _bent(z: Tensor, y: Tensor) -> Tensor:
    """A loss without a closed form."""
    return ((z - y).square() + 1).log().mean() + z.exp().mean()


def _curvatures(default: str) -> dict[str, Any]:
    """Everything that a matrix can be asked, with random numbers where it takes some."""
    model, x, _ = _network("mlp")
    square, y, u, noise = mlp(4, 6, 4), randn(16, 3, seed=2), randn(48, seed=5), randn(16, 4, seed=6)
    found: dict[str, Any] = {}
    with torch.device(default):
        matrices = {
            "GaussNewton": GaussNewton.from_loss(model, F.mse_loss, x, y),
            "GaussNewton, no closed form": GaussNewton.from_loss(model, _bent, x, y),
            "GaussNewton of a model": GaussNewton.from_model(model, x),
            "GaussNewton, chunks": GaussNewton.from_loss(model, F.mse_loss, x, y, microbatch=5),
            "MonteCarloFisher": MonteCarloFisher.from_loss(model, F.mse_loss, x, y),
            "EmpiricalFisher": EmpiricalFisher.from_loss(model, F.mse_loss, x, y),
            "Hessian": Hessian.from_loss(model, F.mse_loss, x, y),
        }
        for name, matrix in matrices.items():
            found |= {
                f"{name}: dense": matrix.to_dense(),
                f"{name}: diagonal": matrix.diagonal(),
                f"{name}: trace": matrix.trace(),
                f"{name}: estimated trace": matrix.trace(samples=3),
            }
        found |= {
            "Jᵀu": linearize(model, x).vjp(u),
            "Gram": JacobianGram.from_model(model, x).to_dense(),
            "batch Jacobian": batch_jacobian(model, x),
            "divergence": divergence(square, x),
            "Hutchinson": hutchinson_divergence(square, x, noise),
        }
    return found


def test_matrices_are_the_same_under_any_default_device() -> None:
    expected, found = _curvatures("cpu"), _curvatures("meta")
    for name, value in expected.items():
        for one, other in zip(_flat(found[name]), _flat(value), strict=True):
            assert one.device.type == "cpu", name
            assert torch.equal(one, other), name


def _flat(value: Tensor | tuple[Tensor, ...] | float) -> list[Tensor]:
    values = value if isinstance(value, tuple) else (value,)
    return [v if isinstance(v, Tensor) else torch.tensor(v, device="cpu") for v in values]
