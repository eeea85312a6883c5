"""Curvature under autocast: in the parameters' own precision, unless the user wants autocast's."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hessfree import CG, KFAC, ConstantDamping, EmpiricalFisher, GaussNewton, HessianFree, Identity, Woodbury
from hessfree.curvature import Curvature
from tests.coverage.study import watched

Loss = Callable[[Tensor, Tensor], Tensor]
LOSSES: dict[str, Loss] = {
    "mse": lambda z, y: F.mse_loss(z, y),
    "cross-entropy": lambda z, y: F.cross_entropy(z, y.argmax(1)),
    "huber": lambda z, y: F.huber_loss(z.float(), y),
}


def network(tail: nn.Module | None = None) -> nn.Module:
    torch.manual_seed(0)
    last = tail or nn.Identity()
    return nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 5), last)


def seen_in_a_step(
    model: nn.Module, loss: Loss, autocast: bool = True, around: bool = False, **settings: Any
) -> tuple[Tensor, str]:
    """Take a step, in or around whose closure autocast is on, and return G as a dense matrix, and the back end."""
    x, y = torch.randn(24, 6, generator=torch.Generator().manual_seed(1)), torch.randn(24, 5)
    settings = {"preconditioner": Identity(), "solver": CG(max_iterations=1), **settings}
    optimizer = HessianFree(model.parameters(), damping_rule=ConstantDamping(), **settings)
    lowered = torch.autocast("cpu", torch.bfloat16, enabled=autocast)

    def closure() -> Tensor:
        optimizer.zero_grad()
        with contextlib.nullcontext() if around else lowered:
            value = loss(model(x), y)
        value.backward()
        return value

    found: list[Tensor] = []

    def see(curvature: Curvature, *_: object) -> None:
        size = curvature.operator.size
        found.append(torch.stack([curvature.operator @ row for row in torch.eye(size)[:: size // 150]]))

    with watched(see), lowered if around else contextlib.nullcontext():
        torch.manual_seed(2)
        optimizer.step(closure)
    report = optimizer.last_step
    assert report is not None and report.accepted
    return found[0], report.backend


def asymmetry(rows: Tensor) -> float:
    """Return how far the square part of every k-th row and every k-th column is from symmetric."""
    square = rows[:, :: rows.shape[1] // 150][:, : len(rows)]
    return float((square - square.T).norm() / square.norm())


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("around", [False, True])
@pytest.mark.parametrize("backend", ["auto", "graph"])
def test_products_are_in_the_precision_of_the_parameters(name: str, around: bool, backend: str) -> None:
    found, chosen = seen_in_a_step(network(), LOSSES[name], around=around, linearization=backend)
    exact, _ = seen_in_a_step(network(), LOSSES[name], autocast=False)
    assert chosen == ("traced" if backend == "auto" else "graph")
    assert found.dtype == torch.float32
    assert asymmetry(found) <= 1e-6
    assert float((found - exact).norm()) <= 0.02 * float(exact.norm())  # H is taken at outputs that were rounded


class Widened(nn.Module):
    """Of what autocast rounded, a float32 that does not show it."""

    def forward(self, z: Tensor) -> Tensor:
        return z.float()


def blocks(z: Tensor, y: Tensor) -> Tensor:
    """A loss whose Hessian has no closed form, and a block for each sample."""
    d = z.float() - y
    return (d.sum(1).square() + d.square().sum(1) + (d[:, 0] * d[:, 1]).square()).mean()


@pytest.mark.parametrize("microbatch", [7, 24])
def test_steps_of_a_part_at_a_time_are_as_precise(microbatch: int) -> None:
    whole, _ = seen_in_a_step(network(), blocks)
    found, chosen = seen_in_a_step(network(), blocks, microbatch=microbatch)
    assert chosen == "traced"
    assert float((found - whole).norm()) <= 1e-6 * float(whole.norm())


@pytest.mark.parametrize("operator", [GaussNewton, EmpiricalFisher])
@pytest.mark.parametrize("loss", [F.mse_loss, blocks])
@pytest.mark.parametrize("tail", [None, Widened()])
def test_operators_of_a_part_at_a_time_are_as_precise(
    tail: nn.Module | None, loss: Loss, operator: type[GaussNewton | EmpiricalFisher]
) -> None:
    model, x, y = network(tail), torch.randn(24, 6), torch.randn(24, 5)
    v = torch.randn(sum(p.numel() for p in model.parameters()), 2)
    exact = operator.from_loss(model, loss, x, y) @ v
    with torch.autocast("cpu", torch.bfloat16):
        whole = operator.from_loss(model, loss, x, y) @ v
        found = operator.from_loss(model, loss, x, y, microbatch=7) @ v
    assert found.dtype == torch.float32
    assert float((found - whole).norm()) <= 1e-6 * float(whole.norm())
    assert float((found - exact).norm()) <= 0.05 * float(exact.norm())  # the loss is that of rounded outputs


@pytest.mark.parametrize("backend", ["auto", "graph"])
def test_the_precision_of_autocast_if_it_is_asked_for(backend: str) -> None:
    options: dict[str, Any] = {"linearization": backend, "curvature_precision": "autocast"}
    found, chosen = seen_in_a_step(network(), LOSSES["mse"], **options)
    exact, _ = seen_in_a_step(network(), LOSSES["mse"], autocast=False)
    assert chosen == ("traced" if backend == "auto" else "graph")
    assert 1e-4 <= asymmetry(found) <= 0.1
    assert float((found - exact).norm()) <= 0.1 * float(exact.norm())
    plain, _ = seen_in_a_step(network(), LOSSES["mse"], autocast=False, **options)
    assert torch.equal(plain, exact) or float((plain - exact).norm()) <= 1e-6 * float(exact.norm())


@pytest.mark.parametrize("tail", [nn.LayerNorm(5), nn.Softplus()])
def test_outputs_that_autocast_leaves_in_float32(tail: nn.Module) -> None:
    """Their dtype does not tell how they were rounded."""
    found, chosen = seen_in_a_step(network(tail), LOSSES["mse"])
    assert chosen == "traced"
    assert asymmetry(found) <= 1e-6


@pytest.mark.parametrize("preconditioner", [KFAC(), Woodbury()])
@pytest.mark.parametrize("precision", ["parameters", "autocast"])
def test_preconditioners_under_autocast(preconditioner: Any, precision: str) -> None:
    found, _ = seen_in_a_step(
        network(), LOSSES["mse"], preconditioner=preconditioner, curvature_precision=precision, curvature_batch=16
    )
    assert bool(torch.isfinite(found).all())


def test_a_network_that_cannot_be_evaluated_again_is_told_of() -> None:
    model = network()
    both = nn.ModuleList([model, nn.Linear(5, 5)])

    def through(z: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(both[1](z), y)

    with pytest.warns(UserWarning, match="in the precision of the closure's autocast"):
        optimizer = HessianFree(both.parameters(), preconditioner=Identity())
        x, y = torch.randn(8, 6), torch.randn(8, 5)

        def closure() -> Tensor:
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = through(model(x), y)
            loss.backward()
            return loss

        optimizer.step(closure)


@pytest.mark.parametrize("value", ["float32", None, "bf16"])
def test_other_precisions_are_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="curvature_precision=.* must be 'parameters' or 'autocast'"):
        HessianFree(network().parameters(), curvature_precision=value)


def test_copies_keep_the_precision() -> None:
    optimizer = HessianFree(network().parameters(), curvature_precision="autocast")
    assert copy.deepcopy(optimizer).settings.curvature_precision == "autocast"
