"""Conjugate gradients against dense linear algebra and scipy."""

from __future__ import annotations

import math
from typing import Any

import pytest
import scipy.sparse.linalg
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from hessfree.solvers import CG, Map, Solution, Status
from tests.solvers.oracles import DenseOperator, model_value, symmetric, vector

SIZE = 40
SPECTRA = {
    "even": torch.linspace(1, 3, SIZE, dtype=torch.float64),
    "decades": torch.logspace(-3, 1, SIZE, dtype=torch.float64),
    "clusters": torch.tensor([1.0, 10.0, 100.0, 1000.0], dtype=torch.float64).repeat(SIZE // 4),
    "rank 5": torch.cat([torch.arange(1.0, 6.0, dtype=torch.float64), torch.zeros(SIZE - 5, dtype=torch.float64)]),
}
EXACT = CG(max_iterations=2000, tolerance=1e-12)


def jacobi(matrix: Tensor, shift: float | Tensor) -> Map:
    inverse = 1 / (matrix.diagonal() + shift)
    return lambda r: r * inverse


def check(solution: Solution, matrix: Tensor, rhs: Tensor, shift: float | Tensor) -> None:
    """What holds for every solution: finite, its residual is its residual, the lists fit."""
    assert bool(torch.isfinite(solution.value).all())
    expected = rhs - matrix @ solution.value - shift * solution.value
    assert float((solution.residual - expected).norm()) <= 1e-9 * float(rhs.norm() + expected.norm() + 1)
    assert len(solution.residuals) == solution.iterations + 1
    assert abs(solution.residuals[-1] - float(expected.norm() / rhs.norm())) <= 1e-9 * max(1, solution.residuals[-1])


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
    solution = CG(max_iterations=0).solve(DenseOperator(matrix), rhs, 0.1, jacobi(matrix, 0.1), start)
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
    assert solution.residuals == (0.0,) and solution.iterations == 0


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


def test_one_parameter() -> None:
    operator = DenseOperator(torch.tensor([[3.0]], dtype=torch.float64))
    solution = CG().solve(operator, torch.tensor([2.0], dtype=torch.float64), 1.0)
    assert solution.status is Status.CONVERGED and solution.iterations == 1
    assert solution.value.tolist() == [0.5]


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


class Reads(TorchFunctionMode):
    """Notes every moment at which the host asks a tensor for its numbers."""

    names = ("tolist", "item", "__bool__", "__float__", "__int__", "cpu", "numpy", "__index__", "__len__", "__array__")

    def __init__(self, events: list[str]) -> None:
        super().__init__()
        self.events = events

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in self.names:
            self.events.append("read")
        return func(*args, **(kwargs or {}))


def solve_without_waiting(
    patch: pytest.MonkeyPatch, solver: CG, *args: Any, events: list[str] | None = None, **kwargs: Any
) -> Solution:
    """Solve as on an accelerator, where the host looks only at the end."""
    with patch.context() as context:
        context.setattr(CG, "_waits", lambda self, rhs: False)
        with Reads([] if events is None else events):
            return solver.solve(*args, **kwargs)


def test_an_accelerator_is_waited_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []

    def note(count: int, product: Tensor) -> Tensor:
        events.append("product")
        return product

    matrix, rhs = symmetric(SPECTRA["decades"], seed=30), vector(SIZE, seed=31)
    solver = CG(max_iterations=6)
    args = (DenseOperator(matrix, note), rhs, 0.1, jacobi(matrix, 0.1))
    solve_without_waiting(monkeypatch, solver, *args, events=events)
    assert events == ["product"] * 6 + ["read"]
    meta = torch.empty(3, device="meta")
    assert not solver._waits(meta) and solver._waits(rhs)
    assert CG(max_iterations=6, tolerance=0.1)._waits(meta) and CG(max_iterations=20)._waits(meta)


def spoil_third(count: int, product: Tensor) -> Tensor:
    return product * (math.nan if count == 3 else 1.0)


CASES: dict[str, tuple[Tensor, Any, float]] = {
    "plain": (symmetric(SPECTRA["decades"], seed=32), None, 1.0),
    "zero": (symmetric(SPECTRA["decades"], seed=32), None, 0.0),
    "exact": (torch.eye(SIZE, dtype=torch.float64), None, 1.0),
    "negative": (symmetric(-SPECTRA["even"], seed=33), None, 1.0),
    "negative later": (symmetric(SPECTRA["decades"] - 0.1, seed=34), None, 1.0),
    "not finite": (symmetric(SPECTRA["decades"], seed=32), spoil_third, 1.0),
}


@pytest.mark.parametrize("name", CASES)
def test_both_ways_of_monitoring_give_the_same_bits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix, change, factor = CASES[name]
    solver, rhs = CG(max_iterations=10), factor * vector(SIZE, seed=35)
    for precondition in (None, lambda r: 0.3 * r):
        waited = solver.solve(DenseOperator(matrix, change), rhs, 0.0, precondition)
        blind = solve_without_waiting(monkeypatch, solver, DenseOperator(matrix, change), rhs, 0.0, precondition)
        assert torch.equal(waited.value, blind.value) and torch.equal(waited.residual, blind.residual)
        assert (waited.status, waited.iterations, waited.residuals) == (blind.status, blind.iterations, blind.residuals)


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
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        CG(**settings)
