"""The dense solver against dense linear algebra, and where Cholesky's factor does not exist."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from hessfree.solvers import CG, DenseCholesky, Status
from tests.solvers.oracles import DenseOperator, model_value, symmetric, vector

SIZE = 30
SPECTRUM = torch.logspace(-3, 1, SIZE, dtype=torch.float64)


@pytest.mark.parametrize("shifts", ["number", "vector"])
def test_equals_the_dense_solution(shifts: str) -> None:
    matrix, rhs = symmetric(SPECTRUM, seed=1), vector(SIZE, seed=2)
    shift = 0.1 if shifts == "number" else torch.linspace(0.05, 2, SIZE, dtype=torch.float64)
    shifted = matrix + torch.diag(torch.zeros(SIZE, dtype=torch.float64) + shift)
    expected = torch.linalg.solve(shifted, rhs)
    solution = DenseCholesky().solve(DenseOperator(matrix), rhs, shift)
    assert solution.status is Status.DIRECT and not solution.failed
    assert float((solution.value - expected).norm()) <= 1e-10 * float(expected.norm())
    assert float((solution.residual - (rhs - shifted @ solution.value)).norm()) <= 1e-12
    assert solution.residuals[0] == 1 and 0 <= solution.residuals[1] <= 1e-10
    by_products = CG(tolerance=1e-12, max_iterations=1000).solve(DenseOperator(matrix), rhs, shift)
    torch.testing.assert_close(solution.value, by_products.value, rtol=1e-7, atol=1e-8)


def test_one_parameter_and_a_zero_right_hand_side() -> None:
    operator = DenseOperator(torch.tensor([[3.0]]))
    assert DenseCholesky().solve(operator, torch.tensor([2.0]), 1.0).value.tolist() == [0.5]
    zero = DenseCholesky().solve(operator, torch.tensor([0.0]), 1.0)
    assert zero.value.tolist() == [0.0] and zero.residuals == (1.0, 0.0)


def test_too_many_parameters() -> None:
    operator = DenseOperator(torch.eye(11))
    with pytest.raises(ValueError, match=r"11x11 matrix .* GB, and max_parameters is 10; use solver=CG\(\)"):
        DenseCholesky(max_parameters=10).solve(operator, torch.ones(11), 0.0)
    assert operator.products == 0
    assert DenseCholesky(max_parameters=11).solve(operator, torch.ones(11), 0.0).status is Status.DIRECT


@pytest.mark.parametrize("lowest", [-1e-14, -0.3, -100.0])
def test_a_matrix_that_is_not_positive_definite_gets_more_damping(lowest: float) -> None:
    spectrum = SPECTRUM.clone()
    spectrum[0] = lowest
    matrix, rhs = symmetric(spectrum, seed=3), vector(SIZE, seed=4)
    solution = DenseCholesky().solve(DenseOperator(matrix), rhs, 0.0)
    assert solution.status is Status.SHIFTED and not solution.failed
    assert model_value(matrix, rhs, 0.0, solution.value) < 0
    # the residual is that of the matrix as it was given
    expected = rhs - matrix @ solution.value
    assert float((solution.residual - expected).norm()) <= 1e-9 * float(solution.value.norm() + 1)
    added = float(solution.value @ solution.residual / solution.value.square().sum())  # (A + tI) x = b
    assert -lowest < added <= 20 * max(-lowest, torch.finfo(torch.float64).eps * 10)
    if lowest < -0.1:  # (beyond rounding, x is determined)
        torch.testing.assert_close(matrix @ solution.value + added * solution.value, rhs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", range(6))
def test_a_singular_matrix_without_damping_leads_downhill(seed: int, dtype: torch.dtype) -> None:
    jacobian = vector(5 * SIZE, seed, dtype).view(5, SIZE)
    matrix, rhs = jacobian.T @ jacobian, vector(SIZE, seed + 1, dtype)
    solution = DenseCholesky().solve(DenseOperator(matrix), rhs, 0.0)
    assert not solution.failed and bool(torch.isfinite(solution.value).all())
    assert model_value(matrix, rhs, 0.0, solution.value) < 0


def test_a_zero_matrix_ends() -> None:
    solution = DenseCholesky().solve(DenseOperator(torch.zeros(4, 4)), torch.ones(4), 0.0)
    assert solution.status is Status.SHIFTED and bool((solution.value > 0).all())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_numbers_that_are_not_finite(bad: float) -> None:
    matrix, rhs = symmetric(SPECTRUM, seed=5), vector(SIZE, seed=6)
    spoiled = matrix.clone()
    spoiled[2, 3] = spoiled[3, 2] = bad
    for solution in (
        DenseCholesky().solve(DenseOperator(spoiled), rhs, 0.1),
        DenseCholesky().solve(DenseOperator(matrix), rhs * bad, 0.1),
    ):
        assert solution.failed and torch.equal(solution.value, torch.zeros_like(rhs))


def test_nothing_given_is_changed() -> None:
    matrix, rhs, shift = symmetric(SPECTRUM, seed=7), vector(SIZE, seed=8), torch.rand(SIZE, dtype=torch.float64)
    copies = [t.clone() for t in (matrix, rhs, shift)]
    DenseCholesky().solve(DenseOperator(matrix), rhs, shift)
    assert all(torch.equal(a, b) for a, b in zip(copies, (matrix, rhs, shift), strict=True))


def test_only_cg_uses_a_preconditioner() -> None:
    assert CG().uses_preconditioner and not DenseCholesky().uses_preconditioner


@pytest.mark.parametrize("value", [0, -3, 1.5])
def test_settings_out_of_range(value: Any) -> None:
    with pytest.raises(ValueError, match=f"max_parameters={value} must be a positive integer"):
        DenseCholesky(max_parameters=value)
