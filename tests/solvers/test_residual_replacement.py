"""The recurrence of the residual drifts in float32; replacing it brings x to the accuracy of the product."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hessfree.solvers import CG, Solution, Status
from tests.solvers.oracles import SIZE, SPECTRA, DenseOperator, check, jacobi, symmetric, vector


def solve(
    matrix: Tensor, rhs: Tensor, shift: float, start: Tensor | None, replace: bool
) -> tuple[Solution, float, int]:
    """Return the solution, its residual summed in double precision, and the products beyond one an iteration."""
    operator = DenseOperator(matrix)
    solver = CG(max_iterations=2000, progress=None, replace_residual=replace)
    solution = solver.solve(operator, rhs, shift, start=start)
    a, b, x = matrix.double(), rhs.double(), solution.value.double()
    extra = operator.products - solution.iterations - (start is not None)
    return solution, float((b - a @ x - shift * x).norm() / b.norm()), extra


@pytest.mark.parametrize("decades", [3, 4])
@pytest.mark.parametrize("far", [None, 1e3], ids=["cold", "far start"])
@pytest.mark.parametrize("seed", range(3))
def test_the_true_residual_is_smaller_after_many_iterations(seed: int, far: float | None, decades: int) -> None:
    size, shift = 200, 10.0 ** (1 - decades)
    matrix = symmetric(torch.logspace(2 - decades, 2, size, dtype=torch.float32), seed)
    rhs = vector(size, seed + 10, torch.float32)
    start = None if far is None else far * vector(size, seed + 20, torch.float32)
    plain, drifted, _ = solve(matrix, rhs, shift, start, replace=False)
    exact, replaced, extra = solve(matrix, rhs, shift, start, replace=True)
    # the drift is that of the greatest x on the way
    assert replaced <= (0.5 if far is None else 0.05) * drifted
    # the accuracy of a product in float32: rounding of the largest eigenvalue times ‖x‖, summed over a row
    attainable = 1e-7 * 100 * float(exact.value.norm() / rhs.norm())
    assert replaced <= 10 * attainable
    assert plain.residuals[-1] <= 1e-3 * drifted  # the recurrence says that all is well
    assert 0 < extra <= 0.05 * exact.iterations


def test_nothing_is_replaced_where_nothing_drifts() -> None:
    matrix, rhs = symmetric(SPECTRA["decades"], seed=1), vector(SIZE, seed=2)
    found = {}
    for replace in (False, True):
        operator = DenseOperator(matrix)
        solver = CG(tolerance=1e-5, replace_residual=replace)
        found[replace] = solver.solve(operator, rhs, 0.1, jacobi(matrix, 0.1))
        assert operator.products == found[replace].iterations
        check(found[replace], matrix, rhs, 0.1)
    assert found[True].iterations == found[False].iterations
    torch.testing.assert_close(found[True].value, found[False].value, rtol=1e-12, atol=1e-12)


def test_a_product_that_is_not_finite_still_leaves_the_iterate_before() -> None:
    matrix, rhs = symmetric(SPECTRA["decades"], seed=3), vector(SIZE, seed=4)
    spoiled = DenseOperator(matrix, lambda count, product: product * (float("nan") if count == 4 else 1))
    found = CG(max_iterations=9, replace_residual=True).solve(spoiled, rhs, 0.1)
    assert found.status is Status.NON_FINITE
    before = CG(max_iterations=3, replace_residual=True).solve(DenseOperator(matrix), rhs, 0.1)
    assert torch.equal(found.value, before.value)
    check(found, matrix, rhs, 0.1)
