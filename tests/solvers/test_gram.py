"""The dual solver against dense linear algebra: any right-hand side, any damping, and where rounding bites."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from hessfree.operators import LowRank, Root
from hessfree.solvers import CG, GramCholesky, Status
from tests.solvers.oracles import DenseOperator, check, model_value, vector

ROWS, SIZE = 12, 30


class DenseRoot(Root):
    """A matrix U that is there."""

    words = "all of it"

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix
        self.count, self.size = matrix.shape
        self.dtype, self.device = matrix.dtype, matrix.device

    def matvec(self, v: Tensor) -> Tensor:
        return self.matrix @ v

    def rmatvec(self, u: Tensor) -> Tensor:
        return self.matrix.T @ u

    def gram(self, weights: float | Tensor = 1.0) -> Tensor:
        return (self.matrix * weights @ self.matrix.T).tril()  # the lower triangle counts

    def to(self, dtype: torch.dtype) -> DenseRoot:
        return DenseRoot(self.matrix.to(dtype))


class Gram(DenseOperator):
    """UᵀU + diag(d)."""

    def __init__(self, root: Tensor, diagonal: float | Tensor = 0.0) -> None:
        super().__init__(root.T @ root + torch.diag(torch.zeros(root.shape[1], dtype=root.dtype) + diagonal))
        self.root, self.diagonal_part = root, diagonal

    def low_rank(self) -> LowRank:
        return LowRank(DenseRoot(self.root), self.diagonal_part)


def root(seed: int = 1, lowest: float = -3, dtype: torch.dtype = torch.float64, rows: int = ROWS) -> Tensor:
    """Rows with singular values from 10^lowest to 10."""
    scales = torch.logspace(lowest, 1, rows, dtype=torch.float64)
    return (scales.unsqueeze(1) * torch.linalg.qr(vector(SIZE * rows, seed).view(SIZE, rows))[0].T).to(dtype)


def exact(operator: Gram, rhs: Tensor, shift: float | Tensor) -> Tensor:
    matrix = operator.matrix.double()
    return torch.linalg.solve(matrix + torch.diag(matrix.new_zeros(SIZE) + shift), rhs.double())


@pytest.mark.parametrize("rows", [1, ROWS, 50])
@pytest.mark.parametrize("shifts", ["number", "vector", "small"])
def test_any_right_hand_side(rows: int, shifts: str) -> None:
    numbers = {"number": 0.1, "vector": torch.linspace(0.05, 2, SIZE, dtype=torch.float64), "small": 1e-6}
    shift, u = numbers[shifts], vector(rows * SIZE, 1).view(rows, SIZE)
    operator, rhs = Gram(u), vector(SIZE, seed=2)  # no combination of the rows
    solution = GramCholesky().solve(operator, rhs, shift)
    assert solution.status is Status.DIRECT and not solution.failed
    expected = exact(operator, rhs, shift)
    assert float((solution.value - expected).norm()) <= (1e-8 if shifts == "small" else 1e-10) * float(expected.norm())
    check(solution, operator.matrix, rhs, shift)
    if shifts != "small":
        by_products = CG(tolerance=1e-12, max_iterations=1000).solve(operator, rhs, shift)
        torch.testing.assert_close(solution.value, by_products.value, rtol=1e-8, atol=1e-8)


def test_a_diagonal_beside_the_rows_joins_the_damping() -> None:
    diagonal = torch.linspace(-0.02, 3, SIZE, dtype=torch.float64)
    operator, rhs = Gram(root(), diagonal), vector(SIZE, seed=2)
    solution = GramCholesky().solve(operator, rhs, 0.1)
    assert solution.status is Status.DIRECT
    assert float((solution.value - exact(operator, rhs, 0.1)).norm()) <= 1e-11 * float(rhs.norm())


@pytest.mark.parametrize("ratio", [1e-3, 1e-4, 1e-5, 1e-6, 1e-8])
def test_float32_is_refined(ratio: float) -> None:
    operator, rhs = Gram(root(lowest=-1, dtype=torch.float32)), vector(SIZE, 2, torch.float32)
    shift = ratio * 100  # the largest eigenvalue is 100
    solution = GramCholesky().solve(operator, rhs, shift)
    assert solution.residual is not None
    first, last = solution.residuals[1], solution.residuals[-1]
    # where the right-hand side is no combination of the rows, x is b / λ, of which UᵀU sees the rounding
    floor = torch.finfo(torch.float32).eps / min(ratio, 1)
    assert last <= 1e-6 + 2 * floor
    assert last <= first
    plain = GramCholesky(refinements=0).solve(operator, rhs, shift)
    assert len(plain.residuals) == 2 and last <= plain.residuals[1]
    assert solution.memory["double"] is (ratio < 2e-6)


def test_float64_sums_where_the_damping_is_below_rounding() -> None:
    u = root(lowest=-2, dtype=torch.float32)
    rhs = u.T @ vector(ROWS, 2, torch.float32)  # a combination of the rows, as a gradient is
    operator, shift = Gram(u), 1e-6
    solution = GramCholesky().solve(operator, rhs, shift)
    assert solution.status is Status.DIRECT and solution.memory["double"]
    expected = exact(Gram(u.double()), rhs, shift)
    assert float((solution.value - expected).norm()) <= 1e-5 * float(expected.norm())
    again = GramCholesky().solve(operator, rhs, shift, memory=solution.memory)
    assert torch.equal(again.value, solution.value)  # what is remembered saves time alone
    assert GramCholesky().solve(operator, rhs, 1.0, memory=solution.memory).memory["double"] is False


def test_spring() -> None:
    operator, rhs, shift = Gram(root()), vector(SIZE, 2), 0.3
    solver = GramCholesky(momentum=0.9)
    first = solver.solve(operator, rhs, shift)
    torch.testing.assert_close(first.value, exact(operator, rhs, shift))
    other, target = Gram(root(seed=3)), rhs + 0.5 * vector(SIZE, 4)
    second = solver.solve(other, target, shift, memory=first.memory)
    # argmin of ½ xᵀUᵀUx − bᵀx + ½ λ ‖x − μ x'‖²
    torch.testing.assert_close(second.value, exact(other, target + 0.9 * shift * first.value, shift))
    assert second.residual is not None
    torch.testing.assert_close(second.residual, target - other.matrix @ second.value - shift * second.value)
    uphill = solver.solve(other, -rhs, shift, memory={"solution": 100 * first.value})
    torch.testing.assert_close(uphill.value, exact(other, -rhs, shift))


@pytest.mark.parametrize("shift", [0.0, -0.05])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_damping_the_direction_leads_downhill(shift: float, dtype: torch.dtype) -> None:
    operator, rhs = Gram(root(dtype=dtype)), vector(SIZE, 2, dtype)
    solution = GramCholesky().solve(operator, rhs, shift)
    assert solution.status is Status.SHIFTED and not solution.failed
    assert model_value(operator.matrix, rhs, max(shift, 0.0), 1e-6 * solution.value) < 0
    zero = GramCholesky().solve(Gram(torch.zeros(3, SIZE, dtype=dtype)), rhs, 0.0)
    assert zero.status is Status.SHIFTED and float(zero.value @ rhs) > 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_numbers_that_are_not_finite(bad: float) -> None:
    u, rhs = root(), vector(SIZE, 2)
    spoiled = u.clone()
    spoiled[2, 3] = bad
    for operator, b in ((Gram(spoiled), rhs), (Gram(u), rhs * bad)):
        solution = GramCholesky().solve(operator, b, 0.1)
        assert solution.failed and torch.equal(solution.value, torch.zeros_like(rhs))


def test_too_many_rows() -> None:
    operator, rhs = Gram(root()), vector(SIZE, 2)
    with pytest.raises(ValueError, match=r"Gram matrix of 12 rows .* GB, and max_rows is 11; .* solver=CG\(\)"):
        GramCholesky(max_rows=11).solve(operator, rhs, 0.1)
    assert operator.products == 0
    assert GramCholesky(max_rows=12).solve(operator, rhs, 0.1).status is Status.DIRECT
    with pytest.raises(ValueError, match=r"DenseOperator is no Gram matrix of known rows; use solver=CG\(\)"):
        GramCholesky().solve(DenseOperator(operator.matrix), rhs, 0.1)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [("max_rows", 0, "positive integer"), ("momentum", 1.0, "0 <= it < 1"), ("refinements", -1, "0 or more")],
)
def test_settings_out_of_range(name: str, value: Any, words: str) -> None:
    with pytest.raises(ValueError, match=f"{name}={value} .*{words}"):
        GramCholesky(**{name: value})
