"""Gram matrices of Jacobians against the dense Jacobians of an independent oracle, in float64."""

from __future__ import annotations

import dataclasses

import numpy
import pytest
import torch
from scipy.sparse.linalg import eigsh, svds
from torch import Tensor
from torch.nn import functional as F

from hessfree import GaussNewton, JacobianGram
from hessfree.linearization import LinearizationError
from hessfree.operators.jacobian_gram import GramForm
from tests.architectures import mlp, randn
from tests.networks import make
from tests.oracle import error, truth
from tests.problem import Problem

NAMES = ["mean_squared_error", "weighted_cross_entropy", "segmentation", "gru", "nested_outputs", "dropout", "in_place"]


def root_of(problem: Problem) -> Tensor:
    """The root that the operator uses, which squares to the oracle's H."""
    exact = GaussNewton.from_loss(problem.model, problem.loss_fn, problem.inputs, problem.targets)
    form = exact.root_form("test")
    root = torch.stack([form.root(e) for e in torch.eye(exact.linearization.space.size, dtype=torch.float64)], 1)
    assert error(root @ root.T, truth(problem).output_hessian) <= 1e-10
    return root


def check(operator: JacobianGram, true: Tensor) -> None:
    rows, columns = true.shape
    assert operator.shape == (rows, columns)
    forms: list[GramForm] = ["products"]
    if operator.left.by_layers is not None:
        forms += ["layers", "jacobian"]
    for form in forms:
        same = JacobianGram(operator.left, operator.right, form)
        assert error(same.to_dense(), true) <= 1e-10
        assert error(same.diagonal(), true.diagonal()) <= 1e-10
    v, u, block = randn(columns, seed=5), randn(rows, seed=6), randn(columns, 3, seed=7)
    assert error(operator.to_dense(), true) <= 1e-10
    assert error(operator.adjoint().to_dense(), true.T) <= 1e-10
    assert error(operator.diagonal(), true.diagonal()) <= 1e-10
    assert error(operator @ v, true @ v) <= 1e-10
    assert error(operator @ block, true @ block) <= 1e-10
    assert error(operator.rmatvec(u), true.T @ u) <= 1e-10
    assert error(operator.adjoint() @ u, true.T @ u) <= 1e-10
    if rows == columns:
        assert error(operator.trace(), true.trace()) <= 1e-10


@pytest.mark.parametrize("name", [name for name in NAMES if name != "nested_outputs"])
def test_of_a_model(name: str) -> None:
    problem = make(name)
    jacobian = truth(problem).jacobian
    check(JacobianGram.from_model(problem.model, problem.inputs), jacobian @ jacobian.T)


@pytest.mark.parametrize("name", NAMES)
def test_of_a_loss(name: str) -> None:
    problem = make(name)
    true = truth(problem)
    root = root_of(problem)
    torch.manual_seed(0)
    operator = JacobianGram.from_loss(problem.model, problem.loss_fn, problem.inputs, problem.targets)
    check(operator, root.T @ true.jacobian @ true.jacobian.T @ root)
    dense = operator.to_dense()
    assert torch.equal(dense, dense.T)
    ours, theirs = torch.linalg.eigvalsh(dense).flip(0), torch.linalg.eigvalsh(true.gauss_newton).flip(0)
    shared = min(len(ours), len(theirs))
    assert float((ours[:shared] - theirs[:shared]).abs().max()) <= 1e-10 * float(theirs[0])


@pytest.mark.parametrize(("rows", "others"), [(5, 3), (2, 6), (4, 4)])
def test_cross_blocks(rows: int, others: int) -> None:
    problem = make("weighted_cross_entropy")
    x, y = randn(rows, 3, seed=8), torch.arange(rows) % 3
    other_x, other_y = randn(others, 3, seed=9), torch.arange(others) % 2
    left = dataclasses.replace(problem, inputs=x, targets=y)
    right = dataclasses.replace(problem, inputs=other_x, targets=other_y)
    for side in (left, right):
        side.outputs = lambda side=side: (side.model(side.inputs),)
        side.ell = lambda z, side=side: side.loss_fn(z[0], side.targets)
        side.forward = lambda side=side: side.loss_fn(side.model(side.inputs), side.targets)
    a, b = truth(left).jacobian, truth(right).jacobian
    check(JacobianGram.from_model(problem.model, x, other_x), a @ b.T)
    weighted = JacobianGram.from_loss(problem.model, problem.loss_fn, x, y, other_x, other_y)
    check(weighted, root_of(left).T @ a @ b.T @ root_of(right))


def test_in_chunks_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, other = mlp(3, 4, 2), randn(5, 3), randn(7, 3, seed=4)
    same = JacobianGram.from_model(model, x, form="products")
    cross = JacobianGram.from_model(model, x, other, form="products")
    whole = [(k.to_dense(), k.diagonal()) for k in (same, cross, cross.adjoint())]
    # three rows at a time, and then so many that the left side's rows are held
    for rows in (3, 10):
        monkeypatch.setattr("hessfree.operators.rows.CHUNK", rows * same.left.operator.size)
        for operator, (dense, diagonal) in zip((same, cross, cross.adjoint()), whole, strict=True):
            assert error(operator.to_dense(), dense) <= 1e-13
            assert error(operator.diagonal(), diagonal) <= 1e-13


@pytest.mark.parametrize("microbatch", [2, 3, 50])
def test_streaming(microbatch: int) -> None:
    model, x, other = mlp(3, 4, 3), randn(5, 3), randn(8, 3, seed=4)
    y, other_y = torch.tensor([0, 2, -100, 1, 1]), torch.arange(8) % 3
    for a, b in ((x, None), (x, other), (other, x)):
        whole = JacobianGram.from_model(model, a, b).to_dense()
        check(JacobianGram.from_model(model, a, b, microbatch=microbatch), whole)
    for arguments in ((x, y), (x, y, other, other_y)):
        whole = JacobianGram.from_loss(model, F.cross_entropy, *arguments).to_dense()
        check(JacobianGram.from_loss(model, F.cross_entropy, *arguments, microbatch=microbatch), whole)
    with pytest.raises(LinearizationError, match="microbatch=2"):
        JacobianGram.from_model(make("conv_batchnorm").model, randn(4, 1, 4, 4), microbatch=2)


def test_by_scipy() -> None:
    model, x, other = mlp(3, 6, 3), randn(8, 3), randn(5, 3, seed=4)
    same, cross = JacobianGram.from_model(model, x), JacobianGram.from_model(model, x, other)
    values = eigsh(same.to_scipy(), k=10, v0=numpy.ones(24), return_eigenvectors=False)
    assert error(torch.from_numpy(numpy.sort(values)), torch.linalg.eigvalsh(same.to_dense())[-10:]) <= 1e-10
    singular = svds(cross.to_scipy(), k=4, v0=numpy.ones(15), return_singular_vectors=False)
    assert error(torch.from_numpy(numpy.sort(singular)), torch.linalg.svdvals(cross.to_dense())[:4].flip(0)) <= 1e-10


def test_layers_are_held_in_factors_and_nothing_above_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = mlp(3, 4, 2), randn(5, 3)
    gram = JacobianGram.from_model(model, x, randn(6, 3, seed=4))
    assert gram.left.by_layers is not None and gram.left.by_rows is not None
    assert [f.s.shape for f in gram.left.by_layers.rows.factors] == [(10, 4), (10, 2)]
    assert gram.left.by_layers.words == "layer factors" and gram.left.by_rows.words == "whole rows"
    expected = gram.to_dense()
    monkeypatch.setattr("hessfree.operators.factored_root.MOST_HELD", 50)
    for form in ("layers", "jacobian"):
        with pytest.raises(ValueError, match=f"form='{form}' cannot be used: .* does not fit; use form='products'"):
            JacobianGram.from_model(model, x, form=form).to_dense()
    small = JacobianGram.from_model(model, x, randn(6, 3, seed=4))
    assert small.left.by_layers is None and error(small.to_dense(), expected) <= 1e-12
    with pytest.raises(ValueError, match="form='dense' must be 'auto', 'layers', 'jacobian' or 'products'"):
        JacobianGram.from_model(model, x, form="dense")  # type: ignore[arg-type]


def test_errors() -> None:
    model, x = mlp(3, 4, 2), randn(5, 3)
    with pytest.raises(ValueError, match="6x10 operator has no trace"):
        JacobianGram.from_model(model, x[:3], x).trace()
    problem = make("indefinite")
    with pytest.raises(ValueError, match="JacobianGram needs a square root .* negative ones"):
        JacobianGram.from_loss(problem.model, problem.loss_fn, problem.inputs, problem.targets)
    with pytest.raises(ValueError, match="JacobianGram is made of the network's outputs alone"):
        JacobianGram.from_loss(model, lambda z, y: F.mse_loss(z, y) + model[0].weight.square().sum(), x, randn(5, 2))
