"""What one solve leaves for the next: a start, a tolerance, a step length."""

from __future__ import annotations

import gc
import math

import pytest
import torch
from torch import Tensor

from hessfree.solvers import CG, EisenstatWalker, RootGradientNorm, Status
from tests.solvers.oracles import SIZE, SPECTRA, DenseOperator, check, jacobi, model_value, symmetric, vector

MATRIX, RHS = symmetric(SPECTRA["decades"], seed=40), vector(SIZE, seed=41)


def test_settings_without_memory_leave_none() -> None:
    for solver in (CG(max_iterations=3), CG(max_iterations=0), CG(tolerance=1e-3), CG(replace_residual=True)):
        assert dict(solver.solve(DenseOperator(MATRIX), RHS, 0.1).memory) == {}


@pytest.mark.parametrize("preconditioned", [False, True])
def test_a_product_sees_five_vectors(preconditioned: bool) -> None:
    """They are b, x, r, p and the product: what is divided among ranks by `shard_vectors`."""

    class Counting(DenseOperator):
        seen = 0

        def matvec(self, v: Tensor) -> Tensor:
            product = super().matvec(v)
            vectors = (t for t in gc.get_objects() if type(t) is Tensor and t.shape == (SIZE,))
            found = {t.untyped_storage().data_ptr() for t in vectors} - before
            self.seen = max(self.seen, len(found))
            return product

    rhs = RHS.clone()
    vectors = [t for t in gc.get_objects() if type(t) is Tensor and t.shape == (SIZE,) and t is not rhs]
    before = {t.untyped_storage().data_ptr() for t in vectors}
    operator = Counting(MATRIX)
    CG(max_iterations=6).solve(operator, rhs, 0.1, jacobi(MATRIX, 0.1) if preconditioned else None)
    assert 4 <= operator.seen <= 5 + preconditioned  # the diagonal of the preconditioner is one more


@pytest.mark.parametrize("iterations", [0, 1, 4])
def test_a_warm_start_is_the_last_solution_decayed(iterations: int) -> None:
    solver, cold = CG(max_iterations=iterations, warm_start=0.95), CG(max_iterations=iterations)
    first = solver.solve(DenseOperator(MATRIX), RHS, 0.1)
    assert torch.equal(first.value, cold.solve(DenseOperator(MATRIX), RHS, 0.1).value)
    operator, rhs = DenseOperator(MATRIX), RHS + 0.1 * vector(SIZE, seed=42)
    shrunk = 0.1 * first.value if iterations == 0 else first.value  # the preconditioner alone has no length of its own
    second = solver.solve(operator, rhs, 0.2, memory={"solution": shrunk})
    expected = cold.solve(DenseOperator(MATRIX), rhs, 0.2, start=0.95 * shrunk)
    assert torch.equal(second.value, expected.value)
    assert operator.products == iterations + 1
    assert torch.equal(second.memory["solution"], second.value)
    check(second, MATRIX, rhs, 0.2)


@pytest.mark.parametrize("factor", [-1.0, 1e3, math.nan])
@pytest.mark.parametrize("iterations", [0, 1, 3])
def test_a_start_worse_than_zero_is_dropped(factor: float, iterations: int) -> None:
    bad = factor * torch.linalg.solve(MATRIX, RHS)
    found = CG(max_iterations=iterations, warm_start=1.0).solve(
        DenseOperator(MATRIX), RHS, 0.1, jacobi(MATRIX, 0.1), memory={"solution": bad}
    )
    assert not model_value(MATRIX, RHS, 0.1, bad) <= 0
    cold = CG(max_iterations=iterations).solve(DenseOperator(MATRIX), RHS, 0.1, jacobi(MATRIX, 0.1))
    assert torch.equal(found.value, cold.value)
    assert found.residuals == cold.residuals and found.status is cold.status


def test_a_start_that_is_given_goes_before_the_one_remembered() -> None:
    start = vector(SIZE, seed=43)
    found = CG(max_iterations=3, warm_start=0.9).solve(
        DenseOperator(MATRIX), RHS, 0.1, start=start, memory={"solution": RHS}
    )
    assert torch.equal(found.value, CG(max_iterations=3).solve(DenseOperator(MATRIX), RHS, 0.1, start=start).value)


def test_a_warm_start_saves_iterations_on_a_system_that_changes_little() -> None:
    cold, warm = CG(tolerance=1e-4), CG(tolerance=1e-4, warm_start=1.0)
    memory = warm.solve(DenseOperator(MATRIX), RHS, 0.1).memory
    rhs = RHS + 1e-3 * vector(SIZE, seed=44)
    again, fresh = (s.solve(DenseOperator(MATRIX), rhs, 0.1, memory=memory) for s in (warm, cold))
    assert again.status is fresh.status is Status.CONVERGED
    assert again.iterations <= 0.6 * fresh.iterations


@pytest.mark.parametrize("forcing", [EisenstatWalker(), RootGradientNorm()], ids=str)
def test_a_forcing_term_ends_every_solve(forcing: EisenstatWalker | RootGradientNorm) -> None:
    solver, memory, last = CG(tolerance=forcing), None, (None, None)
    for scale in (1.0, 0.3, 0.05, 0.06):
        rhs = scale * RHS
        eta = forcing.tolerance(float(rhs.norm()), *last)
        found = solver.solve(DenseOperator(MATRIX), rhs, 0.01, memory=memory)
        assert found.status is Status.CONVERGED
        assert found.residuals[-1] <= eta < min(found.residuals[:-1])
        memory, last = found.memory, (float(rhs.norm()), eta)
        assert dict(memory) == {"norm": last[0], "tolerance": last[1]}
        assert all(type(value) is float for value in memory.values())


def length_of(matrix: Tensor, rhs: Tensor, shift: float, z: Tensor) -> Tensor:
    return (rhs @ z) / (z @ (matrix @ z + shift * z))


@pytest.mark.parametrize("every", [2, 4])
def test_a_step_length_is_found_at_every_nth_solve_and_reused_between(every: int) -> None:
    solver, memory, products = CG(max_iterations=1, every=every), None, []
    length = limit = torch.tensor(math.nan)
    shortened = 0
    for i in range(9):
        rhs, operator = vector(SIZE, seed=50 + i), DenseOperator(MATRIX + 0.01 * i * torch.eye(SIZE))
        shift = 0.1 + 0.02 * i
        z = jacobi(MATRIX, shift)(rhs)
        found = solver.solve(operator, rhs, shift, jacobi(MATRIX, shift), memory=memory)
        if i % every == 0:
            length = length_of(operator.matrix, rhs, shift, z)
            limit = length * (rhs @ z)  # length² zᵀMz, up to the length
        factor = (limit / (length * (rhs @ z))).sqrt().clamp_max(1)
        shortened += int(factor < 0.999)
        torch.testing.assert_close(found.value, factor * length * z, rtol=1e-12, atol=1e-14)
        assert (found.status is Status.REUSED) == (i % every > 0) and not found.failed
        check(found, operator.matrix, rhs, shift)
        products.append(operator.products)
        memory = found.memory
        assert {type(value) for value in memory.values()} == {float, int}
    assert products == [int(i % every == 0) for i in range(9)]
    assert 0 < shortened < 9 - sum(products)


def test_a_reused_step_length_is_no_leap_where_the_gradient_explodes() -> None:
    solver = CG(max_iterations=1, every=2)
    first = solver.solve(DenseOperator(MATRIX), RHS, 0.1)
    again = solver.solve(DenseOperator(MATRIX), 1e6 * RHS, 0.1, memory=first.memory)
    torch.testing.assert_close(again.value, first.value)
    smaller = solver.solve(DenseOperator(MATRIX), 1e-3 * RHS, 0.1, memory=first.memory)
    torch.testing.assert_close(smaller.value, 1e-3 * first.value)


def test_a_length_of_no_meaning_is_not_reused() -> None:
    solver = CG(max_iterations=1, every=3)
    negative = solver.solve(DenseOperator(-MATRIX), RHS, 0.0)
    assert negative.status is Status.NEGATIVE_CURVATURE and dict(negative.memory) == {}
    assert dict(solver.solve(DenseOperator(MATRIX), 0 * RHS, 0.1).memory) == {}
    memory = solver.solve(DenseOperator(MATRIX), RHS, 0.1).memory
    broken = solver.solve(DenseOperator(MATRIX), RHS, 0.1, lambda r: r * math.nan, memory=memory)
    assert broken.failed and bool(torch.isfinite(broken.value).all())
