"""What conjugate gradients do where the numbers break down, and that they never return worse than the start."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hessfree.solvers import CG, Map, Status
from tests.solvers.oracles import SIZE, SPECTRA, DenseOperator, check, jacobi, model_value, symmetric, vector


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", [1, 2, 5])
def test_a_product_that_is_not_finite_leaves_the_iterate_before(at: int, bad: float) -> None:
    def spoil(count: int, product: Tensor) -> Tensor:
        return torch.where(torch.arange(SIZE) == 3, bad, product) if count == at else product

    matrix, rhs = symmetric(SPECTRA["decades"], seed=16), vector(SIZE, seed=17)
    solution = CG(max_iterations=9).solve(DenseOperator(matrix, spoil), rhs, 0.1)
    assert solution.status is Status.NON_FINITE and solution.failed and solution.iterations == at
    before = torch.zeros_like(rhs)
    if at > 1:
        before = CG(max_iterations=at - 1).solve(DenseOperator(matrix), rhs, 0.1).value
    assert torch.equal(solution.value, before)
    check(solution, matrix, rhs, 0.1)


@pytest.mark.parametrize("at", [1, 3])
def test_a_preconditioner_that_is_not_finite(at: int) -> None:
    calls = 0

    def precondition(r: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return r * (math.nan if calls == at else 1.0)

    matrix, rhs = symmetric(SPECTRA["decades"], seed=18), vector(SIZE, seed=19)
    solution = CG(max_iterations=9).solve(DenseOperator(matrix), rhs, 0.1, precondition)
    assert solution.status is Status.NON_FINITE and solution.failed
    expected = torch.zeros_like(rhs)  # call number k prepares iteration k
    if at > 1:
        expected = CG(max_iterations=at - 1).solve(DenseOperator(matrix), rhs, 0.1).value
    assert torch.equal(solution.value, expected)
    alone = CG(max_iterations=0).solve(DenseOperator(matrix), rhs, 0.1, lambda r: r * math.nan)
    assert alone.status is Status.NON_FINITE and torch.equal(alone.value, torch.zeros_like(rhs))


def test_a_right_hand_side_or_start_that_is_not_finite_fails() -> None:
    matrix, rhs = symmetric(SPECTRA["even"], seed=18), vector(SIZE, seed=19)
    assert CG(max_iterations=3).solve(DenseOperator(matrix), rhs * math.nan, 0.1).failed
    assert CG(max_iterations=3).solve(DenseOperator(matrix), rhs, 0.1, start=rhs * math.inf).failed


def test_numbers_beyond_the_range_of_float32_fail_and_stay_finite() -> None:
    matrix = torch.diag(torch.full((4,), 1e-30))
    solution = CG(max_iterations=5).solve(DenseOperator(matrix), torch.full((4,), 1e12), 0.0)
    assert solution.failed and bool(torch.isfinite(solution.value).all())


def test_an_indefinite_preconditioner_is_told_from_bad_numbers() -> None:
    matrix, rhs = symmetric(SPECTRA["decades"], seed=18), vector(SIZE, seed=19)
    at_once = CG(max_iterations=9).solve(DenseOperator(matrix), rhs, 0.1, lambda r: -r)
    assert at_once.status is Status.INDEFINITE and at_once.failed and at_once.iterations == 0
    signs = torch.ones(SIZE, dtype=torch.float64)
    signs[rhs.abs().argmin()] = -100.0
    later = CG(max_iterations=50, progress=None).solve(DenseOperator(matrix), rhs, 0.1, lambda r: signs * r)
    assert later.status is Status.INDEFINITE and not later.failed and later.iterations >= 1
    assert model_value(matrix, rhs, 0.1, later.value) < 0


def test_negative_curvature_along_the_first_direction_is_followed_for_its_own_length() -> None:
    matrix, rhs = symmetric(-SPECTRA["even"], seed=20), vector(SIZE, seed=21)
    for precondition, start in ((None, None), (lambda r: 0.5 * r, None), (None, vector(SIZE, seed=22))):
        solution = CG(max_iterations=9).solve(DenseOperator(matrix), rhs, 0.1, precondition, start)
        assert (solution.status, solution.iterations) == (Status.NEGATIVE_CURVATURE, 1)
        begin = torch.zeros_like(rhs) if start is None else start
        residual = rhs - matrix @ begin - 0.1 * begin
        expected = begin + (residual if precondition is None else 0.5 * residual)
        torch.testing.assert_close(solution.value, expected, rtol=1e-12, atol=1e-12)
        assert model_value(matrix, rhs, 0.1, solution.value) < model_value(matrix, rhs, 0.1, begin)
        check(solution, matrix, rhs, 0.1)


def test_negative_curvature_later_leaves_the_iterate_before() -> None:
    spectrum = SPECTRA["decades"].clone()
    spectrum[0] = -0.5
    matrix, rhs = symmetric(spectrum, seed=23), vector(SIZE, seed=24)
    solution = CG(max_iterations=100).solve(DenseOperator(matrix), rhs, 0.0)
    assert solution.status is Status.NEGATIVE_CURVATURE and not solution.failed and solution.iterations > 1
    before = CG(max_iterations=solution.iterations - 1, progress=None).solve(DenseOperator(matrix), rhs, 0.0)
    assert torch.equal(solution.value, before.value)
    check(solution, matrix, rhs, 0.0)


def test_a_singular_matrix_without_shift() -> None:
    matrix, start = symmetric(SPECTRA["rank 5"], seed=25), vector(SIZE, seed=26)
    inside = matrix @ start  # in the range: the solution of least norm
    solution = CG(tolerance=1e-10).solve(DenseOperator(matrix), inside, 0.0)
    expected = torch.linalg.pinv(matrix, rtol=1e-10) @ inside
    assert solution.status is Status.CONVERGED
    assert float((solution.value - expected).norm()) <= 1e-8 * float(expected.norm())
    outside = CG(max_iterations=30).solve(DenseOperator(matrix), vector(SIZE, seed=27), 0.0)
    assert bool(torch.isfinite(outside.value).all())
    assert model_value(matrix, vector(SIZE, seed=27), 0.0, outside.value) < 0
    nothing = CG(max_iterations=5).solve(DenseOperator(0 * matrix), inside, 0.0)
    assert nothing.status is Status.NEGATIVE_CURVATURE and torch.equal(nothing.value, inside)


def inconsistent(seed: int, size: int, dtype: torch.dtype) -> Map:
    """Another positive definite matrix at every call, and not even a symmetric one."""
    generator = torch.Generator().manual_seed(seed)

    def apply(r: Tensor) -> Tensor:
        noise = torch.randn(size, size, generator=generator, dtype=torch.float64) / size**0.5
        factor = noise @ noise.T + 0.1 * torch.eye(size, dtype=torch.float64) + 0.3 * (noise - noise.T)
        return (factor @ r.double()).to(dtype)

    return apply


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("iterations", [1, 3, 60])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("preconditioner", ["none", "jacobi", "inconsistent"])
def test_never_worse_than_the_start(seed: int, iterations: int, dtype: torch.dtype, preconditioner: str) -> None:
    size = 25
    decades = (seed % 4) * 3  # condition numbers up to 1e9: far beyond float32
    matrix = symmetric(torch.logspace(-decades, 0, size, dtype=dtype) * 10.0 ** (seed % 3), seed)
    rhs, start = vector(size, seed + 100, dtype), vector(size, seed + 200, dtype) if seed % 2 else None
    shift = 0.0 if seed % 5 == 0 else 1e-3
    maps = {
        "none": None,
        "jacobi": jacobi(matrix.double().abs() + 1e-6, shift),
        "inconsistent": inconsistent(seed, size, dtype),
    }
    precondition = maps[preconditioner]
    if preconditioner == "jacobi":
        precondition = lambda r: maps["jacobi"](r.double()).to(dtype)  # noqa: E731
    solution = CG(max_iterations=iterations).solve(DenseOperator(matrix), rhs, shift, precondition, start)
    begin = torch.zeros_like(rhs) if start is None else start
    before = model_value(matrix, rhs, shift, begin)
    assert bool(torch.isfinite(solution.value).all())
    # the solver sums m(x) in its own precision: that is all it may be off
    slack = 10 * torch.finfo(dtype).eps * float((solution.value.norm() + begin.norm()) * rhs.norm())
    assert model_value(matrix, rhs, shift, solution.value) <= before + slack


@pytest.mark.parametrize("warm", [False, True])
def test_what_ends_above_the_start_is_not_taken(warm: bool) -> None:
    noise = vector(100, seed=28).view(10, 10)
    matrix = torch.eye(10, dtype=torch.float64) + 3 * (noise - noise.T)  # no product of a symmetric matrix
    start = vector(10, seed=29) if warm else None
    solution = CG(max_iterations=4).solve(DenseOperator(matrix), vector(10, seed=30), 0.0, start=start)
    assert solution.status is Status.NO_BETTER and not solution.failed
    assert torch.equal(solution.value, torch.zeros(10, dtype=torch.float64) if start is None else start)
