"""What a step pays for: curvature is set up, and products are taken, only where something asks for them."""

from __future__ import annotations

import math
import time
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hessfree import (
    CG,
    KFAC,
    Armijo,
    ConstantDamping,
    GaussNewton,
    HessianFree,
    Identity,
    LevenbergMarquardt,
    QuadraticModelMomentum,
    StepReport,
)
from hessfree.curvature import CurvatureBuilder
from tests.test_optimizer import closure_for, mlp, regression

PLAIN: dict[str, Any] = {"preconditioner": Identity(), "damping_rule": ConstantDamping()}


def costs(patch: pytest.MonkeyPatch, steps: int, **settings: Any) -> tuple[list[int], list[int], list[StepReport]]:
    """Return, for each step, how often curvature was set up and how many products were taken, and the reports."""
    events: list[str] = []
    build, matvec, form = CurvatureBuilder.build, GaussNewton.matvec, GaussNewton.quadratic_form

    def building(self: CurvatureBuilder, *args: Any) -> Any:
        events.append("set-up")
        return build(self, *args)

    def multiplying(self: GaussNewton, v: Tensor) -> Tensor:
        events.append("product")
        return matvec(self, v)

    def measuring(self: GaussNewton, vectors: Tensor) -> Tensor:
        events.extend(["product"] * len(vectors))  # though it takes J alone
        return form(self, vectors)

    model, (x, y) = mlp(torch.float32), regression(dtype=torch.float32)
    optimizer = HessianFree(model.parameters(), **settings)
    closure = closure_for(optimizer, lambda: F.mse_loss(model(x), y))
    set_ups, products, reports = [], [], []
    with patch.context() as context:
        context.setattr(CurvatureBuilder, "build", building)
        context.setattr(GaussNewton, "matvec", multiplying)
        context.setattr(GaussNewton, "quadratic_form", measuring)
        for _ in range(steps):
            events.clear()
            optimizer.step(closure)
            set_ups.append(events.count("set-up"))
            products.append(events.count("product"))
            assert optimizer.last_step is not None and optimizer.last_step.accepted
            reports.append(optimizer.last_step)
    return set_ups, products, reports


def test_a_step_of_cg_takes_a_product_an_iteration(monkeypatch: pytest.MonkeyPatch) -> None:
    set_ups, products, reports = costs(monkeypatch, 6)
    assert (set_ups, products) == ([1] * 6, [3] * 6)
    assert all(math.isfinite(r.predicted_change) for r in reports)
    for solver, expected in (
        (CG(3, replace_residual=True), [3, 3, 3]),
        (CG(3, warm_start=0.95), [3, 4, 4]),
    ):
        assert costs(monkeypatch, 3, solver=solver)[1] == expected


def test_the_preconditioner_alone_takes_none(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"solver": CG(max_iterations=0), "damping_rule": ConstantDamping(), "damping": 1.0}
    set_ups, products, reports = costs(monkeypatch, 10, preconditioner=KFAC(update_every=5), lr=0.1, **settings)
    assert set_ups == [1, 1, 1, 0, 0, 0, 0, 1, 0, 0]  # K-FAC's own updates
    assert products == [0] * 10
    assert "; the preconditioner alone; lambda" in str(reports[-1])
    assert math.isnan(reports[-1].residual) and reports[-1].residuals == ()
    assert math.isnan(reports[-1].predicted_change)
    assert reports[-1].backend == "none" and reports[-1].preconditioner.startswith("K-FAC")
    assert reports[-1].seconds_setup <= 0.01  # nothing was set up


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"damping_rule": LevenbergMarquardt(every=3)}, [1, 0, 0, 1]),
        ({"damping_rule": LevenbergMarquardt(every=3, test="next_loss")}, [1, 0, 0, 1]),
        ({"max_step_norm": 0.1, "step_norm": "curvature"}, [1, 1, 1, 1]),
        ({"max_step_norm": 0.1, "step_norm": "preconditioner"}, [0, 0, 0, 0]),
        ({"max_step_norm": 0.1}, [0, 0, 0, 0]),
        ({"line_search": Armijo()}, [0, 0, 0, 0]),
        ({"gradient_ema": 0.9}, [0, 0, 0, 0]),
        ({"momentum": QuadraticModelMomentum()}, [1, 2, 2, 2]),
        ({"momentum": QuadraticModelMomentum(history=2)}, [1, 2, 3, 3]),
        ({"solver": CG(0, warm_start=0.9)}, [0, 1, 1, 1]),
    ],
    ids=str,
)
def test_without_iterations_who_asks_pays(
    settings: dict[str, Any], expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    set_ups, products, reports = costs(monkeypatch, 4, **(PLAIN | {"solver": CG(0), "lr": 0.05} | settings))
    assert products == expected
    assert set_ups == [min(count, 1) for count in expected]
    for count, report in zip(expected, reports, strict=True):
        if "warm_start" not in str(settings):
            assert math.isfinite(report.predicted_change) == (count > 0)


def test_between_solves_the_step_length_is_reused_and_nothing_set_up(monkeypatch: pytest.MonkeyPatch) -> None:
    solver = CG(max_iterations=1, every=4)
    set_ups, products, reports = costs(monkeypatch, 9, **(PLAIN | {"solver": solver}))
    assert set_ups == products == [1, 0, 0, 0, 1, 0, 0, 0, 1]
    assert [r.iterations for r in reports] == products
    assert "; the preconditioner alone, step length reused; lambda" in str(reports[1])
    assert reports[8].loss < reports[0].loss
    # ρ is asked for at steps 1, 4, 7: where there is no product yet, one is made for it
    rule = LevenbergMarquardt(every=3)
    set_ups, products, reports = costs(monkeypatch, 9, **(PLAIN | {"solver": solver, "damping_rule": rule, "lr": 0.2}))
    assert set_ups == products == [1, 0, 0, 1, 1, 0, 1, 0, 1]
    assert [math.isfinite(r.reduction_ratio) for r in reports] == [i % 3 == 0 for i in range(9)]


def test_set_up_inside_the_solve_is_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    build = CurvatureBuilder.build

    def slowly(self: CurvatureBuilder, *args: Any) -> Any:
        time.sleep(0.5)
        return build(self, *args)

    monkeypatch.setattr(CurvatureBuilder, "build", slowly)
    _, _, reports = costs(monkeypatch, 3, **PLAIN)  # set up by the solver's first product
    for report in reports:
        assert report.seconds_setup >= 0.5
        assert 0 < report.seconds_solve <= 0.45
