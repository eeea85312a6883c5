"""microbatch= on the optimizer: the same steps, from products of a part of the samples at a time."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hessfree import CG, HessianFree, Identity
from hessfree.linearization import ChunkedLinearization
from tests.test_optimizer import TWO_DROPOUTS, closure_for, flat, mlp, regression


def steps(**settings: Any) -> tuple[torch.Tensor, HessianFree]:
    """Take three steps, of which the last has a smaller batch."""
    model, (x, y) = mlp(), regression(40)
    optimizer = HessianFree(model.parameters(), damping=0.1, **settings)
    for rows in (slice(40), slice(40), slice(33)):
        optimizer.step(closure_for(optimizer, lambda rows=rows: F.mse_loss(model(x[rows]), y[rows])))
        assert optimizer.last_step is not None and optimizer.last_step.accepted
    return flat(model.parameters()), optimizer


@pytest.mark.parametrize("backend", ["auto", "graph"])
@pytest.mark.parametrize("curvature_batch", [None, 30])
def test_steps_are_those_of_the_whole_batch(
    curvature_batch: int | None, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"curvature_batch": curvature_batch, "linearization": backend}
    expected, _ = steps(**settings)
    products = []
    multiply = ChunkedLinearization.gauss_newton

    def counting(self: ChunkedLinearization, *args: Any) -> torch.Tensor:
        products.append([rows.stop - rows.start for rows in self._chunks])
        return multiply(self, *args)

    monkeypatch.setattr(ChunkedLinearization, "gauss_newton", counting)
    found, optimizer = steps(microbatch=16, **settings)
    assert (found - expected).norm() <= 1e-9 * expected.norm()
    count = 40 if curvature_batch is None else 30
    assert products[0] == ([16, 16, 8] if curvature_batch is None else [16, 14])
    assert len(products) == 9 and optimizer.settings.microbatch == 16
    assert optimizer.last_step.curvature_samples == min(count, 33)
    assert optimizer.last_step.backend == ("traced" if backend == "auto" else "graph")


def test_a_batch_of_one_chunk_is_not_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    expected, _ = steps()
    monkeypatch.setattr(ChunkedLinearization, "__init__", None)
    assert torch.equal(steps(microbatch=40)[0], expected)


@pytest.mark.parametrize("layer", [TWO_DROPOUTS, nn.BatchNorm1d(8)], ids=["dropout", "batchnorm"])
def test_where_samples_are_mixed_products_take_all_at_a_time(layer: nn.Module) -> None:
    reached = []
    for microbatch in (None, 10):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 8), copy.deepcopy(layer), nn.Tanh(), nn.Linear(8, 2)).double()
        x, y = regression(40)
        optimizer = HessianFree(
            model.parameters(), preconditioner=Identity(), solver=CG(max_iterations=5), microbatch=microbatch
        )
        closure = closure_for(optimizer, lambda model=model, x=x, y=y: F.mse_loss(model(x), y))
        if microbatch is None:
            optimizer.step(closure)
        else:
            with pytest.warns(UserWarning, match="microbatch=10 cannot be used.*other outputs on a part of the batch"):
                optimizer.step(closure)
        optimizer.step(closure)  # warned once
        reached.append(flat(model.parameters()))
    assert (reached[0] - reached[1]).norm() <= 1e-12 * reached[0].norm()


def test_without_a_batch_dimension() -> None:
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(x).sum(0)

    model, (x, _) = Shifted(), regression(40)
    optimizer = HessianFree(model.parameters(), microbatch=1)
    with pytest.raises(ValueError, match="microbatch=1 divides the batch along dimension 0.*use microbatch=None"):
        optimizer.step(closure_for(optimizer, lambda: model(x).square().sum()))
