"""The minimiser over span{x, previous steps} against dense algebra in double precision."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hessfree import CG, QuadraticModelMomentum
from hessfree.momentum import Direction
from tests.solvers.oracles import DenseOperator, model_value, symmetric, vector

SIZE = 30
MOMENTUM = QuadraticModelMomentum()
MATRIX = symmetric(torch.logspace(-2, 1, SIZE, dtype=torch.float64), seed=1)
RHS = vector(SIZE, seed=2)


def combine(
    matrix: Tensor, rhs: Tensor, shift: float | Tensor, previous: Tensor | None, iterations: int = 3
) -> Direction:
    """Combine, and check what holds always: the curvature fits, and the model is no worse than at the solver's own."""
    operator = DenseOperator(matrix)
    solution = CG(max_iterations=iterations).solve(operator, rhs, shift)
    before = operator.products
    direction = MOMENTUM.combine(operator, rhs, shift, solution, () if previous is None else (previous,))
    # the solver's own direction costs none, unless the solver took none
    assert operator.products - before == (previous is not None) + (solution.residual is None)
    assert direction.bend is not None
    d = direction.value
    bend = float(d @ matrix @ d + d @ (shift * d))
    assert not abs(float(direction.bend) - bend) > 1e-4 * (abs(bend) + float(rhs.norm() * d.norm()))
    own, found = (model_value(matrix, rhs, shift, x) for x in (solution.value, direction.value))
    assert found <= own + 10 * torch.finfo(rhs.dtype).eps * abs(own)
    return direction


@pytest.mark.parametrize("iterations", [0, 1, 3, 8])
@pytest.mark.parametrize("shifts", ["number", "vector"])
@pytest.mark.parametrize("seed", range(3))
def test_is_the_minimiser_over_the_span(seed: int, shifts: str, iterations: int) -> None:
    previous = vector(SIZE, seed=10 + seed)
    shift = 0.1 if shifts == "number" else torch.linspace(0.05, 2, SIZE, dtype=torch.float64)
    own = CG(max_iterations=iterations).solve(DenseOperator(MATRIX), RHS, shift).value
    span = torch.stack([own, previous], 1)
    damped = MATRIX + torch.diag(torch.zeros(SIZE, dtype=torch.float64) + shift)
    weights = torch.linalg.solve(span.T @ damped @ span, span.T @ RHS)
    found = combine(MATRIX, RHS, shift, previous, iterations)
    torch.testing.assert_close(found.value, span @ weights, rtol=1e-9, atol=1e-10)
    best = span @ weights
    torch.testing.assert_close(found.bend, best @ damped @ best, rtol=1e-8, atol=1e-9)


def test_without_a_previous_step() -> None:
    own = CG(max_iterations=3).solve(DenseOperator(MATRIX), RHS, 0.1).value
    for previous in (None, torch.zeros_like(RHS)):
        torch.testing.assert_close(combine(MATRIX, RHS, 0.1, previous).value, own, rtol=1e-12, atol=1e-13)
    # the preconditioner alone has no length of its own: it gets the best
    found = combine(MATRIX, RHS, 0.1, None, iterations=0).value
    best = (RHS @ RHS) / (RHS @ (MATRIX @ RHS) + 0.1 * RHS @ RHS)
    torch.testing.assert_close(found, best * RHS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("factor", [1.0, -1e-6, 1e6])
@pytest.mark.parametrize("noise", [0.0, 1e-7, 1e-4])
def test_a_previous_step_that_is_parallel_or_nearly(noise: float, factor: float, dtype: torch.dtype) -> None:
    matrix, rhs = MATRIX.to(dtype), RHS.to(dtype)
    own = CG(max_iterations=3).solve(DenseOperator(matrix), rhs, 0.1).value
    previous = factor * (own + noise * own.norm() * vector(SIZE, seed=3, dtype=dtype) / SIZE**0.5)
    found = combine(matrix, rhs, 0.1, previous).value
    assert bool(torch.isfinite(found).all())
    if noise == 0:
        assert float((found - own).norm()) <= 1e-4 * float(own.norm())


def test_no_direction_at_all() -> None:
    found = combine(MATRIX, torch.zeros_like(RHS), 0.1, torch.zeros_like(RHS))
    assert torch.equal(found.value, torch.zeros_like(RHS))


def test_a_zero_gradient_is_not_met_with_the_previous_step() -> None:
    found = combine(MATRIX, torch.zeros_like(RHS), 0.1, vector(SIZE, seed=4))
    assert float(found.value.norm()) <= 1e-12


@pytest.mark.parametrize("previous", [None, vector(SIZE, seed=5)], ids=["first", "later"])
def test_where_the_model_has_no_minimum_the_direction_stays_what_it_was(previous: Tensor | None) -> None:
    matrix = -MATRIX
    own = CG(max_iterations=3).solve(DenseOperator(matrix), RHS, 0.0).value
    assert torch.equal(combine(matrix, RHS, 0.0, previous).value, own)


@pytest.mark.parametrize("seed", range(8))
def test_an_indefinite_model_never_makes_the_direction_worse(seed: int) -> None:
    spectrum = torch.linspace(-1, 3, SIZE, dtype=torch.float64)
    combine(symmetric(spectrum, seed), RHS, 0.0, vector(SIZE, seed=20 + seed))  # checks the model's value


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_previous_product_that_is_not_finite_is_left_out(bad: float) -> None:
    solution = CG(max_iterations=3).solve(DenseOperator(MATRIX), RHS, 0.1)
    spoiled = DenseOperator(MATRIX, lambda _, product: product * bad)
    found = MOMENTUM.combine(spoiled, RHS, 0.1, solution, (vector(SIZE, seed=6),))
    assert torch.equal(found.value, solution.value)


def damped_minimiser(span: Tensor, shift: float | Tensor) -> Tensor:
    damped = MATRIX + torch.diag(torch.zeros(SIZE, dtype=torch.float64) + shift)
    return span @ torch.linalg.solve(span.T @ damped @ span, span.T @ RHS)


@pytest.mark.parametrize("iterations", [0, 3])
@pytest.mark.parametrize("shifts", ["number", "vector"])
@pytest.mark.parametrize("history", [1, 2, 4])
@pytest.mark.parametrize("known", [0, 1, 3, 6])
def test_is_the_minimiser_over_several_previous_steps(known: int, history: int, shifts: str, iterations: int) -> None:
    shift = 0.1 if shifts == "number" else torch.linspace(0.05, 2, SIZE, dtype=torch.float64)
    previous = [vector(SIZE, seed=30 + i) for i in range(known)]
    operator = DenseOperator(MATRIX)
    solution = CG(max_iterations=iterations).solve(operator, RHS, shift)
    operator.products = 0
    found = QuadraticModelMomentum(history=history).combine(operator, RHS, shift, solution, previous)
    used = previous[:history]  # the last ones
    assert operator.products == len(used) + (iterations == 0)
    expected = damped_minimiser(torch.stack([solution.value, *used], 1), shift)
    torch.testing.assert_close(found.value, expected, rtol=1e-8, atol=1e-10)
    assert found.bend is not None
    torch.testing.assert_close(found.bend, expected @ (MATRIX @ expected + shift * expected), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_more_previous_steps_never_make_the_model_worse(seed: int) -> None:
    solution = CG(max_iterations=3).solve(DenseOperator(MATRIX), RHS, 0.1)
    previous = [vector(SIZE, seed=50 + 10 * seed + i) for i in range(6)]
    values = []
    for history in (1, 2, 4, 6):
        momentum = QuadraticModelMomentum(history=history)
        found = momentum.combine(DenseOperator(MATRIX), RHS, 0.1, solution, previous)
        values.append(model_value(MATRIX, RHS, 0.1, found.value))
    assert all(b < a for a, b in zip(values, values[1:], strict=False))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_previous_steps_that_depend_on_each_other(dtype: torch.dtype) -> None:
    matrix, rhs, one = MATRIX.to(dtype), RHS.to(dtype), vector(SIZE, seed=7, dtype=dtype)
    solution = CG(max_iterations=3).solve(DenseOperator(matrix), rhs, 0.1)
    repeated = [one, one.clone(), -2 * one, one + solution.value, torch.zeros_like(one)]
    momentum = QuadraticModelMomentum(history=5)
    found = momentum.combine(DenseOperator(matrix), rhs, 0.1, solution, repeated).value
    expected = damped_minimiser(torch.stack([solution.value.double(), one.double()], 1), 0.1)
    assert float((found.double() - expected).norm()) <= 1e3 * torch.finfo(dtype).eps * float(expected.norm())


@pytest.mark.parametrize("history", [0, -1, 1.5])
def test_history_out_of_range(history: float) -> None:
    with pytest.raises(ValueError, match=f"history={history} is the number of previous steps: choose an integer"):
        QuadraticModelMomentum(history=history)  # type: ignore[arg-type]
