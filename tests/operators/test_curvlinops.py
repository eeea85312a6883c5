"""A second library's Gauss-Newton matrix."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from hessfree import GaussNewton, Hessian
from tests.architectures import ConvNet, classes, mlp, randn
from tests.oracle import error

curvlinops = pytest.importorskip("curvlinops")

# the first forward-mode product of a process scripts some decompositions, and torch.jit is deprecated
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*")

CASES: dict[str, tuple[Any, nn.Module, Any, Any]] = {
    "mean squared error": (lambda: mlp(3, 4, 2), nn.MSELoss(), randn(6, 3), randn(6, 2, seed=3)),
    "sum of squares": (lambda: mlp(3, 4, 2), nn.MSELoss(reduction="sum"), randn(6, 3), randn(6, 2, seed=3)),
    "cross-entropy": (lambda: ConvNet().double().eval(), nn.CrossEntropyLoss(), randn(6, 1, 4, 4), classes(6, high=3)),
    "bce": (lambda: mlp(3, 4, 2), nn.BCEWithLogitsLoss(), randn(6, 3), classes(6, 2, high=2).double()),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kind", ["GGNLinearOperator", "HessianLinearOperator"])
def test_agrees(name: str, kind: str) -> None:
    torch.manual_seed(0)
    make_model, loss, x, y = CASES[name]
    model = make_model()
    ours = (GaussNewton if kind.startswith("GGN") else Hessian).from_loss(model, loss, x, y)
    params = list(model.parameters())
    theirs = getattr(curvlinops, kind)(model, loss, params, [(x, y)], check_deterministic=False)
    v = randn(ours.size, seed=5)
    assert error(ours @ v, theirs @ v) <= 1e-10
    assert error(ours.to_dense(), theirs @ torch.eye(ours.size, dtype=torch.float64)) <= 1e-10
