"""G against the dense JᵀHJ of an independent oracle, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hessfree import GaussNewton
from hessfree.curvature import CurvatureBuilder
from hessfree.linearization import LinearizationError
from hessfree.operators import SymmetricOperator
from hessfree.recording import Owners, Tail
from tests.architectures import Variational, mlp, randn
from tests.networks import PROBLEMS, make
from tests.oracle import error, recorded, truth
from tests.problem import Problem

FROM_LOSS = [name for name in PROBLEMS if make(name).loss_fn is not None]
INDEFINITE = {"indefinite", "bare_parameter", "named_outputs"}  # losses that are not convex in what they use


def built(problem: Problem, backend: str = "auto") -> tuple[SymmetricOperator, str, list[str]]:
    """Assemble G as the optimizer does."""
    recording, parameters = recorded(problem), problem.parameters
    said: list[str] = []
    builder = CurvatureBuilder(Owners(parameters), None, backend, None, ())
    curvature = builder.build(recording, parameters, 0, said.append)
    return curvature.operator, curvature.cut, said


@pytest.mark.parametrize("name", PROBLEMS)
def test_matrix_of_a_recorded_closure(name: str) -> None:
    problem = make(name)
    true = truth(problem).gauss_newton
    operator, cut, said = built(problem)
    assert (cut, said) == (problem.cut, [])
    assert error(operator.to_dense(), true) <= 1e-10
    assert error(operator.diagonal(), true.diagonal()) <= 1e-10
    v, block = randn(len(true), seed=5), randn(len(true), 3, seed=6)
    assert error(operator @ v, true @ v) <= 1e-10
    assert error(operator @ block, true @ block) <= 1e-10
    assert error(operator.quadratic_form(block.T), block.T @ true @ block) <= 1e-10
    assert error(operator.scaled(3.0).quadratic_form(block.T), 3 * block.T @ true @ block) <= 1e-10


@pytest.mark.parametrize("name", FROM_LOSS)
def test_matrix_of_a_model_and_a_loss(name: str) -> None:
    problem = make(name)
    true = truth(problem).gauss_newton
    operator = GaussNewton.from_loss(problem.model, problem.loss_fn, problem.inputs, problem.targets)
    assert error(operator.to_dense(), true) <= 1e-10
    assert error(operator.diagonal(), true.diagonal()) <= 1e-10
    v = randn(len(true), seed=5)
    assert error(operator @ v, true @ v) <= 1e-10


@pytest.mark.parametrize("name", ["mean_squared_error", "conv_batchnorm", "dropout", "multihead_attention"])
def test_matrix_by_the_functional_back_end(name: str) -> None:
    problem = make(name)
    true = truth(problem).gauss_newton
    operator = GaussNewton.from_loss(
        problem.model, problem.loss_fn, problem.inputs, problem.targets, linearization="functional"
    )
    assert operator.linearization.name == "functional"
    assert error(operator.to_dense(), true) <= 1e-10
    problem = make(name)
    operator, _, said = built(problem, "functional")
    assert said == []
    assert error(operator.to_dense(), true) <= 1e-10


@pytest.mark.parametrize("name", [name for name in FROM_LOSS if name not in {"nested_outputs", "logits_and_loss"}])
def test_plain_jacobian_product_of_a_model(name: str) -> None:
    problem = make(name)
    jacobian = truth(problem).jacobian
    operator = GaussNewton.from_model(problem.model, problem.inputs)
    assert error(operator.to_dense(), jacobian.T @ jacobian) <= 1e-12
    assert error(operator.diagonal(), jacobian.square().sum(0)) <= 1e-12
    v = randn(operator.size, seed=5)
    assert error(operator @ v, jacobian.T @ (jacobian @ v)) <= 1e-12
    assert error(operator.quadratic_form(v[None]), (jacobian @ v).square().sum()[None, None]) <= 1e-12


@pytest.mark.parametrize("name", PROBLEMS)
def test_symmetric_and_for_a_convex_loss_positive(name: str) -> None:
    operator, _, _ = built(make(name))
    u, v = randn(operator.size, seed=21), randn(operator.size, seed=22)
    left, right = float(u @ (operator @ v)), float(v @ (operator @ u))
    assert abs(left - right) <= 1e-12 * float(u.norm() * (operator @ v).norm())
    dense = operator.to_dense()
    assert torch.equal(dense, dense.T)
    eigenvalues = torch.linalg.eigvalsh(dense)
    if name in INDEFINITE:
        assert float(eigenvalues[0]) < 0
    else:
        assert float(eigenvalues[0]) >= -1e-12 * float(eigenvalues[-1])


LOSSES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Tensor, int]] = {
    "scalar": (F.mse_loss, randn(6, 3, seed=3), 1),
    "softmax over 3": (F.cross_entropy, torch.tensor([0, 1, 2, -100, 1, 1]), 1),
    "diagonal": (F.binary_cross_entropy_with_logits, randn(6, 3, seed=3).sigmoid(), 2),
    "penalty": (lambda z, y: F.mse_loss(z, y) + PENALISED[0].weight.square().mean(), randn(6, 3, seed=3), 1),
}
PENALISED = mlp(3, 4, 3)


@pytest.mark.parametrize("words", LOSSES)
@pytest.mark.parametrize("backend", ["traced", "graph", "functional"])
def test_the_loss_is_differentiated_once_an_operator_and_not_once_a_product(
    words: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss, y, probes = LOSSES[words]
    operator = GaussNewton.from_loss(PENALISED, loss, randn(6, 3), y, linearization=backend)
    hessian, j = operator.output_hessian, operator.linearization
    vectors = [randn(operator.size, seed=i) for i in range(4)]
    true = [j.vjp(hessian.matvec(j.jvp(v))) for v in vectors]
    calls, product = [0], Tail.product

    def count(tail: Tail, w: Any, v: Any = None) -> Any:
        calls[0] += w is not None
        return product(tail, w, v)

    monkeypatch.setattr(Tail, "product", count)
    operator = GaussNewton.from_loss(PENALISED, loss, randn(6, 3), y, linearization=backend)
    hessian = operator.output_hessian
    found = [operator @ v for v in vectors]
    assert calls == [probes]
    weight = torch.zeros(operator.size, dtype=torch.float64)
    if words == "penalty":
        weight[:12] = 2 / 12
    else:
        assert hessian.closed.words == words
    assert max(error(a, b + weight * v) for a, b, v in zip(found, true, vectors, strict=True)) <= 1e-13


def test_products_repeat_bit_for_bit() -> None:
    for name in ("dropout", "conv_batchnorm", "nested_outputs"):
        operator, _, _ = built(make(name))
        v = randn(operator.size)
        assert torch.equal(operator @ v, operator @ v)


def test_shapes_dtypes_and_blocks() -> None:
    operator = GaussNewton.from_model(mlp(3, 4, 2), randn(5, 3))
    assert operator.shape == (26, 26)
    v = randn(26)
    assert (operator @ v.float()).dtype == torch.float64
    assert (operator @ torch.empty(26, 0)).shape == (26, 0)
    assert not (operator @ v.requires_grad_()).requires_grad
    for wrong in (randn(25), randn(3, 26), randn(26, 2, 2), torch.tensor(1.0)):
        with pytest.raises(ValueError, match="26x26 operator by a tensor of shape"):
            operator @ wrong


def test_scaled() -> None:
    operator = GaussNewton.from_model(mlp(3, 4, 2), randn(5, 3))
    dense, v = operator.to_dense(), randn(26)
    assert operator.scaled(1) is operator
    half = operator.scaled(0.5)
    assert error(half.to_dense(), 0.5 * dense) <= 1e-15
    assert error(half.diagonal(), 0.5 * dense.diagonal()) <= 1e-14
    assert error(half @ v, 0.5 * (dense @ v)) <= 1e-14


def test_a_model_computed_in_chunks_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = make("weighted_cross_entropy")
    true = truth(problem).gauss_newton
    monkeypatch.setattr("hessfree.operators.rows.CHUNK", 4 * len(true))
    operator, _, _ = built(problem)
    assert error(operator.to_dense(), true) <= 1e-10
    assert error(operator.diagonal(), true.diagonal()) <= 1e-10


def test_a_large_softmax_uses_its_closed_root() -> None:
    model, x, y = mlp(3, 70), randn(4, 3), torch.tensor([0, 5, 69, -100])
    operator = GaussNewton.from_loss(model, F.cross_entropy, x, y)
    assert operator.output_hessian.form.words == "softmax over 70"
    jacobian = GaussNewton.from_model(model, x).linearization.vjps(torch.eye(280, dtype=torch.float64))
    h = torch.autograd.functional.hessian(lambda z: F.cross_entropy(z.view(4, 70), y), model(x).detach().flatten())
    assert error(operator.to_dense(), jacobian.T @ h @ jacobian) <= 1e-12


def test_a_float32_model() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3))
    x, y = torch.randn(16, 3), torch.randint(0, 3, (16,))
    single = GaussNewton.from_loss(model, F.cross_entropy, x, y)
    dense, diagonal, v = single.to_dense(), single.diagonal(), torch.randn(single.size)
    assert dense.dtype == diagonal.dtype == torch.float32
    product = single @ v
    double = GaussNewton.from_loss(model.double(), F.cross_entropy, x.double(), y)
    assert error(dense.double(), double.to_dense()) <= 1e-6
    assert error(diagonal.double(), double.diagonal()) <= 1e-6
    # the operator goes on to be what it was when it was made
    assert torch.equal(single @ v, product)


def test_where_no_gradients_are_kept() -> None:
    problem = make("mean_squared_error")
    with torch.no_grad():
        operator = GaussNewton.from_loss(problem.model, problem.loss_fn, problem.inputs, problem.targets)
    assert error(operator.to_dense(), truth(problem).gauss_newton) <= 1e-10
    assert all(p.grad is None for p in problem.model.parameters())


def test_random_state_after_it_is_as_after_one_call() -> None:
    model, x = Variational().double(), randn(4, 3)
    torch.manual_seed(0)
    model(x)
    state = torch.get_rng_state()
    torch.manual_seed(0)
    operator = GaussNewton.from_model(model, x)
    operator @ randn(operator.size)
    operator.to_dense()
    assert torch.equal(torch.get_rng_state(), state)


def test_errors_of_from_loss() -> None:
    model, x, y = mlp(3, 4, 2), randn(5, 3), randn(5, 2)
    for loss_fn, match in (
        (lambda z, t: (z - t).square(), "shape .5, 2., not a scalar"),
        (lambda z, t: 3.0, "returned 3.0, not a scalar"),
        (lambda z, t: F.mse_loss(z.detach(), t), "does not depend on the parameters"),
        (F.l1_loss, "linear in the outputs of the modules .* use Hessian.from_loss"),
        (lambda z, t: z.sum(), "linear in the parameters|linear in the outputs"),
    ):
        with pytest.raises(ValueError, match=match):
            GaussNewton.from_loss(model, loss_fn, x, y)
    with pytest.raises(ValueError, match="linearization='best'"):
        GaussNewton.from_loss(model, F.mse_loss, x, y, linearization="best")
    with pytest.raises(ValueError, match="no parameter"):
        GaussNewton.from_loss(nn.Tanh(), F.mse_loss, x, y)
    with pytest.raises(ValueError, match="no parameter"):
        GaussNewton.from_model(nn.Tanh(), x)
    with pytest.raises(LinearizationError, match="cannot be used: .*; use linearization='auto'"):
        GaussNewton.from_model(make("lstm").model, randn(2, 3, 2), linearization="functional")


def test_a_non_finite_output_gives_non_finite_products_and_no_exception() -> None:
    model = mlp(3, 4, 2)
    x = randn(5, 3)
    x[2, 1] = float("nan")
    operator = GaussNewton.from_loss(model, F.mse_loss, x, randn(5, 2))
    assert not bool(torch.isfinite(operator @ randn(26)).all())
    assert not bool(torch.isfinite(operator.to_dense()).all())
