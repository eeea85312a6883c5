"""Conjugate gradients against dense linear algebra and scipy, and when they stop."""

from __future__ import annotations

import math
from typing import Any

import pytest
import scipy.sparse.linalg
import torch
from torch import Tensor

from hessfree.solvers import CG, EisenstatWalker, Status
from tests.solvers.oracles import EXACT, SIZE, SPECTRA, DenseOperator, check, jacobi, model_value, symmetric, vector


@pytest.mark.parametrize("start", [False, True], ids=["cold", "warm"])
@pytest.mark.parametrize("preconditioned", [False, True], ids=["plain", "preconditioned"])
@pytest.mark.parametrize("shifts", ["number", "vector"])
@pytest.mark.parametrize("name", SPECTRA)
def test_equals_the_dense_solution(name: str, shifts: str, preconditioned: bool, start: bool) -> None:
    matrix, rhs = symmetric(SPECTRA[name], seed=1), vector(SIZE, seed=2)
    shift = 0.1 if shifts == "number" else torch.linspace(0.05, 2, SIZE, dtype=torch.float64)
    diagonal = torch.diag(torch.full((SIZE,), shift, dtype=torch.float64) if isinstance(shift, float) else shift)
    expected = torch.linalg.solve(matrix + diagonal, rhs)
    solution = EXACT.solve(
        DenseOperator(matrix),
        rhs,
        shift,
        jacobi(matrix, shift) if preconditioned else None,
        vector(SIZE, seed=3) if start else None,
    )
    assert solution.status is Status.CONVERGED and not solution.failed
    assert float((solution.value - expected).norm()) <= 1e-8 * float(expected.norm())
    check(solution, matrix, rhs, shift)


def scipy_iterates(matrix: Tensor, rhs: Tensor, shift: float, inverse: Tensor | None, count: int) -> list[Tensor]:
    iterates: list[Tensor] = []
    scipy.sparse.linalg.cg(
        (matrix + shift * torch.eye(len(rhs), dtype=matrix.dtype)).numpy(),
        rhs.numpy(),
        rtol=0.0,
        atol=0.0,
        maxiter=count,
        M=None if inverse is None else scipy.sparse.diags_array(inverse.numpy()),
        callback=lambda x: iterates.append(torch.tensor(x)),
    )
    return iterates


@pytest.mark.parametrize("preconditioned", [False, True], ids=["plain", "preconditioned"])
@pytest.mark.parametrize("name", ["even", "decades", "clusters"])
def test_takes_the_iterates_of_scipy(name: str, preconditioned: bool) -> None:
    shift = 0.01
    matrix, rhs = symmetric(SPECTRA[name], seed=4), vector(SIZE, seed=5)
    inverse = 1 / (matrix.diagonal() + shift) if preconditioned else None
    iterates = scipy_iterates(matrix, rhs, shift, inverse, 8)
    assert len(iterates) == 8
    for count, expected in enumerate(iterates, start=1):
        solution = CG(max_iterations=count, progress=None).solve(
            DenseOperator(matrix), rhs, shift, jacobi(matrix, shift) if preconditioned else None
        )
        assert solution.status is Status.ITERATIONS and solution.iterations == count
        assert float((solution.value - expected).norm()) <= 1e-9 * float(expected.norm())


def test_a_product_an_iteration_and_not_one_more() -> None:
    operator = DenseOperator(symmetric(SPECTRA["decades"], seed=6))
    CG(max_iterations=7, progress=None).solve(operator, vector(SIZE, seed=7), 0.1)
    assert operator.products == 7


def test_stops_at_the_first_iterate_within_the_tolerance() -> None:
    matrix, rhs = symmetric(SPECTRA["decades"], seed=8), vector(SIZE, seed=9)
    solution = CG(tolerance=1e-3).solve(DenseOperator(matrix), rhs, 0.01)
    assert solution.status is Status.CONVERGED
    assert solution.residuals[-1] <= 1e-3 < min(solution.residuals[:-1])
    assert solution.residuals[0] == 1


def test_a_start_within_the_tolerance_costs_no_iteration() -> None:
    matrix, rhs = symmetric(SPECTRA["even"], seed=8), vector(SIZE, seed=9)
    start = torch.linalg.solve(matrix, rhs)
    solution = CG(tolerance=1e-6).solve(DenseOperator(matrix), rhs, 0.0, start=start)
    assert (solution.status, solution.iterations) == (Status.CONVERGED, 0)
    assert torch.equal(solution.value, start) and solution.value is not start


@pytest.mark.parametrize("progress", [5e-4, 1e-2])
def test_stops_by_the_relative_progress_of_martens(progress: float) -> None:
    matrix, rhs, shift = symmetric(torch.logspace(-2, 1, 120, dtype=torch.float64), seed=10), vector(120, seed=11), 1e-2
    values = [0.0] + [model_value(matrix, rhs, shift, x) for x in scipy_iterates(matrix, rhs, shift, None, 299)]
    expected = next(
        i
        for i in range(1, 300)
        if i > (k := max(10, int(0.1 * i))) and (values[i] - values[i - k]) / values[i] < k * progress
    )
    solution = CG(max_iterations=300, progress=progress).solve(DenseOperator(matrix), rhs, shift)
    assert (solution.status, solution.iterations) == (Status.PROGRESS, expected)


def test_the_rule_of_progress_is_the_default_until_a_tolerance_is_given() -> None:
    matrix, rhs = symmetric(torch.logspace(-4, 2, 120, dtype=torch.float64), seed=10), vector(120, seed=11)
    assert CG().solve(DenseOperator(matrix), rhs, 1e-3).status is Status.PROGRESS
    assert CG(2000, tolerance=1e-10).solve(DenseOperator(matrix), rhs, 1e-3).status is Status.CONVERGED
    assert CG(progress=None).solve(DenseOperator(matrix), rhs, 1e-3).status is Status.ITERATIONS


@pytest.mark.parametrize("warm", [False, True])
def test_without_iterations_it_is_the_preconditioner(warm: bool) -> None:
    matrix, rhs = symmetric(SPECTRA["decades"], seed=12), vector(SIZE, seed=13)
    start = vector(SIZE, seed=14) if warm else None
    operator = DenseOperator(matrix)
    solution = CG(max_iterations=0).solve(operator, rhs, 0.1, jacobi(matrix, 0.1), start)
    assert operator.products == warm  # nothing but the residual of a start
    begin = torch.zeros_like(rhs) if start is None else start
    expected = begin + jacobi(matrix, 0.1)(rhs - matrix @ begin - 0.1 * begin)
    assert (solution.status, solution.iterations) == (Status.PRECONDITIONER, 0)
    torch.testing.assert_close(solution.value, expected, rtol=1e-12, atol=1e-12)
    check(solution, matrix, rhs, 0.1)
    plain = CG(max_iterations=0).solve(DenseOperator(matrix), rhs, 0.1)
    assert torch.equal(plain.value, rhs) and plain.value is not rhs


@pytest.mark.parametrize("solver", [EXACT, CG(max_iterations=3), CG(max_iterations=0)], ids=str)
def test_a_zero_right_hand_side_gives_zero(solver: CG) -> None:
    matrix = symmetric(SPECTRA["even"], seed=15)
    solution = solver.solve(DenseOperator(matrix), torch.zeros(SIZE, dtype=torch.float64), 0.1)
    assert not solution.failed and solution.status in {Status.CONVERGED, Status.PRECONDITIONER}
    assert torch.equal(solution.value, torch.zeros_like(solution.value))
    assert solution.residuals == (() if solver.max_iterations == 0 else (0.0,)) and solution.iterations == 0


def test_one_parameter() -> None:
    operator = DenseOperator(torch.tensor([[3.0]], dtype=torch.float64))
    solution = CG().solve(operator, torch.tensor([2.0], dtype=torch.float64), 1.0)
    assert solution.status is Status.CONVERGED and solution.iterations == 1
    assert solution.value.tolist() == [0.5]


def test_nothing_given_is_changed() -> None:
    matrix, rhs, start = symmetric(SPECTRA["even"], seed=36), vector(SIZE, seed=37), vector(SIZE, seed=38)
    copies = (rhs.clone(), start.clone())
    for solver in (EXACT, CG(max_iterations=0)):
        solver.solve(DenseOperator(matrix), rhs, 0.1, lambda r: r, start)
        assert torch.equal(rhs, copies[0]) and torch.equal(start, copies[1])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"max_iterations": -1}, "max_iterations=-1 must be an integer, 0 or more"),
        ({"max_iterations": 2.5}, "max_iterations=2.5 must be an integer"),
        ({"tolerance": -0.1}, "tolerance=-0.1 is relative"),
        ({"tolerance": 1.0}, "tolerance=1.0 is relative"),
        ({"tolerance": math.nan}, "tolerance=nan is relative"),
        ({"progress": 0.0}, "progress=0.0 must be a number between 0 and 1"),
        ({"progress": "never"}, "progress='never' must be"),
        ({"progress": [1]}, r"progress=\[1\] must be"),
        ({"progress": math.nan}, "progress=nan must be"),
        ({"tolerance": "loose"}, r"tolerance='loose' has no method tolerance\(\).*EisenstatWalker"),
        ({"tolerance": EisenstatWalker}, "tolerance=<class .* has no method"),
        ({"warm_start": 1.5}, "warm_start=1.5 is a factor on the last solution"),
        ({"warm_start": math.nan}, "warm_start=nan is a factor"),
        ({"replace_residual": 50}, "replace_residual=50 must be True or False"),
        ({"every": 0}, "every=0 must be an integer, 1 or more"),
        ({"every": 2}, "every=2 reuses the one step length.*max_iterations=250.*choose max_iterations=1"),
        ({"every": 2, "max_iterations": 1, "warm_start": 0.9}, "every=2 .*warm_start=0.9"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        CG(**settings)
