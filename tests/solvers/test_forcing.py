"""Forcing terms against their formulas, and the order of convergence that they promise."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from hessfree.solvers import CG, EisenstatWalker, Forcing, RootGradientNorm
from tests.solvers.oracles import DenseOperator, symmetric, vector


def test_choice_2_of_eisenstat_and_walker() -> None:
    rule = EisenstatWalker(gamma=0.5, alpha=1.5, first=0.3, maximum=0.8, minimum=1e-4)
    assert rule.tolerance(2.0, None, None) == 0.3
    assert math.isclose(rule.tolerance(1.0, 4.0, 0.3), 0.5 * 0.25**1.5)  # 0.5 · 0.3^1.5 = 0.082 binds not
    assert math.isclose(rule.tolerance(1.0, 4.0, 0.8), 0.5 * 0.8**1.5)  # falls no faster than this
    assert math.isclose(rule.tolerance(1.2, 1.0, 0.3), 0.5 * 1.2**1.5)
    assert rule.tolerance(9.0, 1.0, 0.3) == 0.8
    assert rule.tolerance(1e-9, 1.0, 0.3) == 1e-4
    assert rule.tolerance(1e300, 1e-300, 0.3) == 0.8
    assert rule.tolerance(1.0, 0.0, 0.3) == 0.3  # after a gradient of zero there is no ratio


def test_the_root_of_the_norm() -> None:
    assert RootGradientNorm().tolerance(4.0, None, None) == 0.5
    assert RootGradientNorm().tolerance(0.01, 1.0, 0.5) == 0.1
    assert RootGradientNorm(maximum=0.05).tolerance(0.01, None, None) == 0.05


def newton(forcing: Forcing | float, iterations: int = 60) -> tuple[list[float], int]:
    """Minimise ½ xᵀA x + Σ cosh x − bᵀx by inexact Newton; return the gradients' norms and the products."""
    matrix, b = symmetric(torch.logspace(-2, 1, 40, dtype=torch.float64), seed=1), vector(40, seed=2)
    x, memory, norms, products = torch.zeros_like(b), None, [], 0
    for _ in range(iterations):
        gradient = matrix @ x + x.sinh() - b
        norms.append(float(gradient.norm()))
        if norms[-1] <= 1e-10:
            break
        hessian: Tensor = matrix + torch.diag(x.cosh())
        operator = DenseOperator(hessian)
        found = CG(max_iterations=200, tolerance=forcing).solve(operator, -gradient, 0.0, memory=memory)
        x, memory, products = x + found.value, found.memory, products + operator.products
    return norms, products


@pytest.mark.parametrize(
    "forcing", [EisenstatWalker(minimum=0.0), EisenstatWalker(alpha=1.5, minimum=0.0), RootGradientNorm()], ids=str
)
def test_inexact_newton_converges_faster_than_linearly_and_for_fewer_products(forcing: Forcing) -> None:
    norms, products = newton(forcing)
    assert norms[-1] <= 1e-10
    rates = [b / a for a, b in zip(norms, norms[1:], strict=False)]
    assert rates[-1] <= 1e-2 and rates[-1] <= 0.1 * max(rates)
    fixed, _ = newton(0.5)
    assert len(norms) <= 0.6 * len(fixed)  # a fixed tolerance is linear
    assert products <= 0.8 * newton(1e-9)[1]  # an exact one wastes products far from the minimum


@pytest.mark.parametrize(
    ("kind", "settings", "words"),
    [
        (EisenstatWalker, {"gamma": 0.0}, "gamma=0.0 scales the tolerance: choose 0 < gamma <= 1"),
        (EisenstatWalker, {"gamma": math.nan}, "gamma=nan"),
        (EisenstatWalker, {"alpha": 1.0}, "alpha=1.0 is the order of convergence: choose 1 < alpha <= 2"),
        (EisenstatWalker, {"first": 0.95}, "first=0.95 and maximum=0.9 .* choose 0 <= minimum <= first"),
        (EisenstatWalker, {"minimum": math.nan}, "minimum=nan"),
        (RootGradientNorm, {"maximum": 1.0}, "maximum=1.0 .* choose 0 < maximum < 1"),
    ],
)
def test_settings_out_of_range(kind: Any, settings: dict[str, float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        kind(**settings)
