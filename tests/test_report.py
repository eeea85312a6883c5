from __future__ import annotations

import dataclasses
import math

import pytest

from hessfree import StepReport

FULL = StepReport(
    step=12,
    accepted=True,
    status="accepted",
    loss=0.51234567,
    loss_after=0.4871,
    predicted_change=-0.03,
    reduction_ratio=0.934,
    damping=0.3,
    next_damping=0.27,
    gradient_norm=1.5,
    step_norm=0.0521,
    step_length=1.0,
    iterations=3,
    residual=0.212,
    residuals=(1.0, 0.6, 0.4, 0.212),
    solver_status="iteration limit",
    backend="graph",
    cut="outputs of ToyMLP",
    preconditioner="K-FAC of 4 Linear layers (sampled factors)",
    curvature_samples=256,
    evaluations=1,
    seconds_gradient=0.004,
    seconds_setup=0.003,
    seconds_solve=0.005,
    seconds_evaluate=0.0003,
)
REJECTED = StepReport(step=1, accepted=False, status="rejected: the loss is nan", loss=math.nan, damping=0.3)


def test_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        FULL.loss = 0.0  # type: ignore[misc]


def test_is_one_readable_line() -> None:
    assert str(FULL) == (
        "step 12: loss 0.5123 -> 0.4871 (rho 0.93), accepted; 3 iterations to residual 0.21: iteration limit; "
        "lambda 0.3 -> 0.27, |step| 0.052; cut: outputs of ToyMLP (graph); 12.3 ms"
    )


def test_what_did_not_happen_is_not_in_the_line() -> None:
    assert str(dataclasses.replace(REJECTED, next_damping=0.3)) == (
        "step 1: loss nan, rejected: the loss is nan; lambda 0.3, |step| 0; 0.0 ms"
    )
    direct = dataclasses.replace(FULL, loss_after=math.nan, reduction_ratio=math.nan, iterations=1, next_damping=0.3)
    assert str(direct).startswith("step 12: loss 0.5123, accepted; 1 iteration to residual")
    assert "lambda 0.3, |step|" in str(direct)


def test_a_solver_without_products_says_what_it_did() -> None:
    alone = dataclasses.replace(FULL, iterations=0, residual=math.nan, residuals=(), solver_status="step length reused")
    assert "accepted; step length reused; lambda 0.3" in str(alone)


def test_words_from_elsewhere_do_not_break_the_line() -> None:
    assert "\n" not in str(dataclasses.replace(FULL, status="rejected:\n  a tensor\n"))


@pytest.mark.parametrize("report", [FULL, REJECTED], ids=["full", "rejected"])
def test_scalars_are_floats_by_name(report: StepReport) -> None:
    scalars = report.scalars("hessfree/")
    assert all(type(value) is float for value in scalars.values())
    assert all(name.startswith("hessfree/") for name in scalars)
    words = {"status", "solver_status", "backend", "cut", "preconditioner", "residuals"}
    names = {field.name for field in dataclasses.fields(report)} - words | {"seconds"}
    assert set(report.scalars()) == names  # the same at every step: a logger's columns
    assert scalars["hessfree/accepted"] == float(report.accepted)


def test_seconds_are_the_sum_of_the_parts() -> None:
    assert abs(FULL.seconds - 0.0123) <= 1e-12
    assert FULL.scalars()["seconds"] == FULL.seconds
