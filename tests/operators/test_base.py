"""What every operator has: adjoint, diagonal, trace, and scipy's view of it."""

from __future__ import annotations

import builtins
import sys
from typing import Any

import numpy
import pytest
import torch
from scipy.sparse.linalg import eigsh, svds
from torch import Tensor, nn
from torch.nn import functional as F

from hessfree import GaussNewton, Hessian
from hessfree.operators import Deferred, LinearOperator
from hessfree.vectors import FlatSpace
from tests.architectures import classes, mlp, randn
from tests.oracle import error


class Rectangle(LinearOperator):
    """A dense matrix that shows only its products."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix
        self.dtype, self.device = matrix.dtype, matrix.device

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.matrix.shape
        return rows, columns

    def matvec(self, v: Tensor) -> Tensor:
        return self.matrix @ v

    def rmatvec(self, u: Tensor) -> Tensor:
        return self.matrix.T @ u


def gauss_newton() -> GaussNewton:
    torch.manual_seed(1)
    return GaussNewton.from_loss(mlp(3, 5, 3), F.cross_entropy, randn(20, 3), classes(20, high=3))


def hessian() -> Hessian:
    torch.manual_seed(1)
    return Hessian.from_loss(mlp(3, 5, 3), F.cross_entropy, randn(20, 3), classes(20, high=3))


def test_a_rectangle_and_its_adjoint() -> None:
    matrix = randn(3, 5)
    operator = Rectangle(matrix)
    adjoint = operator.adjoint()
    assert (operator.shape, adjoint.shape) == ((3, 5), (5, 3))
    assert adjoint.adjoint() is operator
    for found, true in ((operator, matrix), (adjoint, matrix.T)):
        rows, columns = true.shape
        assert error(found.to_dense(), true) <= 1e-15
        assert error(found.diagonal(), true.diagonal()) <= 1e-15
        v, u, block = randn(columns), randn(rows, seed=2), randn(columns, 2, seed=3)
        assert error(found @ v, true @ v) <= 1e-15
        assert error(found @ block, true @ block) <= 1e-15
        assert (found @ torch.empty(columns, 0)).shape == (rows, 0)
        assert error(found.rmatvec(u), true.T @ u) <= 1e-15
        with pytest.raises(ValueError, match=f"{rows}x{columns} operator has no trace"):
            found.trace()
        with pytest.raises(ValueError, match=f"{rows}x{columns} operator by a tensor of shape"):
            found @ randn(rows)


def test_symmetric_operators_are_their_own_adjoints() -> None:
    operator = gauss_newton()
    v = randn(operator.size)
    assert operator.adjoint() is operator
    assert torch.equal(operator.rmatvec(v), operator @ v)


@pytest.mark.parametrize("make", [gauss_newton, hessian])
def test_trace(make: Any) -> None:
    operator = make()
    dense = operator.to_dense()
    true, size = dense.trace(), operator.size
    deferred = Deferred(FlatSpace([torch.Size([size])], [torch.float64], dense.device), lambda: operator)
    for known, factor in ((operator, 1.0), (operator.scaled(0.5), 0.5), (deferred, 1.0)):
        assert error(known.trace(), factor * true) <= 1e-12
        # the exact variance of an estimate by random signs, and five deviations of the mean of 400
        deviation = (2 * (dense.square().sum() - dense.diagonal().square().sum()) / 400).sqrt()
        estimate = known.trace(400, seed=3)
        assert float((estimate / factor - true).abs()) <= float(5 * deviation)
        assert float((estimate / factor - true).abs()) > 0
        assert torch.equal(known.trace(400, seed=3), estimate)
        assert not torch.equal(known.trace(400, seed=4), estimate)


def test_the_estimate_is_exact_for_a_diagonal_matrix() -> None:
    operator = Rectangle(torch.diag(randn(7)))
    assert error(operator.trace(1), operator.trace()) <= 1e-14


def test_an_estimate_without_symmetry() -> None:
    operator = Rectangle(randn(6, 6))
    symmetric = 0.5 * (operator.matrix + operator.matrix.T)
    deviation = (2 * (symmetric.square().sum() - symmetric.diagonal().square().sum()) / 500).sqrt()
    assert float((operator.trace(500) - operator.matrix.trace()).abs()) <= float(5 * deviation)


@pytest.mark.parametrize("samples", [0, -1, 1.5, True, "3"])
def test_a_number_of_draws_that_is_none(samples: Any) -> None:
    with pytest.raises(ValueError, match="must be a positive integer"):
        gauss_newton().trace(samples)


@pytest.mark.parametrize("make", [gauss_newton, hessian])
def test_largest_eigenvalues_by_scipy(make: Any) -> None:
    operator = make()
    view = operator.to_scipy()
    assert (view.shape, view.dtype) == (operator.shape, numpy.dtype("float64"))
    true = torch.linalg.eigvalsh(operator.to_dense())
    values, vectors = eigsh(view, k=10, which="LA", v0=numpy.ones(operator.size))
    assert error(torch.from_numpy(values), true[-10:]) <= 1e-10
    vectors = torch.from_numpy(vectors)
    assert error(operator @ vectors, vectors * torch.from_numpy(values)) <= 1e-8


def test_scipy_sees_blocks_adjoints_and_odd_arrays() -> None:
    matrix = randn(6, 4)
    view = Rectangle(matrix).to_scipy()
    true = matrix.numpy()
    x, block = numpy.arange(4.0), numpy.arange(12.0).reshape(4, 3)
    backwards = x[::-1]
    backwards.flags.writeable = False
    for operator, dense in ((view, true), (view.adjoint(), true.T)):
        rows = dense.shape[1]
        assert numpy.allclose(operator @ numpy.eye(rows), dense, rtol=1e-14)
        assert numpy.allclose(operator.matvec(numpy.ones((rows, 1))), dense @ numpy.ones((rows, 1)), rtol=1e-14)
    assert numpy.allclose(view @ backwards, true @ backwards, rtol=1e-14)
    assert numpy.allclose(view @ block, true @ block, rtol=1e-14)
    assert numpy.allclose(view @ x.astype("float32"), true @ x, rtol=1e-14)
    singular = svds(view, k=2, v0=numpy.ones(4), return_singular_vectors=False)
    assert numpy.allclose(numpy.sort(singular), numpy.linalg.svd(true)[1][1::-1], rtol=1e-10)
    with pytest.raises(ValueError, match="the operator is real"):
        view @ (x * 1j)


def test_scipy_sees_float32() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
    operator = GaussNewton.from_loss(model, F.mse_loss, torch.randn(20, 3), torch.randn(20, 2))
    view = operator.to_scipy()
    assert view.dtype == numpy.dtype("float32")
    assert (view @ numpy.ones(operator.size)).dtype == numpy.dtype("float32")
    values = eigsh(view, k=5, v0=numpy.ones(operator.size, "float32"), return_eigenvectors=False)
    true = torch.linalg.eigvalsh(operator.to_dense())[-5:]
    assert error(torch.from_numpy(numpy.sort(values)), true) <= 1e-5


def test_without_scipy_the_error_names_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def refuse(name: str, *args: Any) -> Any:
        if name.startswith("scipy"):
            raise ImportError("No module named 'scipy'")
        return original(name, *args)

    for name in [n for n in sys.modules if n.partition(".")[0] == "scipy"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match=r"pip install 'hessfree\[scipy\]'"):
        gauss_newton().to_scipy()
