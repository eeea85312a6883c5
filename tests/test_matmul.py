"""gram and matmul against torch's own products, in every mode of differentiation."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from hessfree.matmul import gram, matmul

A = [(4, 3), (3, 4), (2, 1, 3, 2)]
AB = [
    ((3, 4), (4, 2)),
    ((2, 3, 4), (4, 2)),  # one B for all
    ((3, 4), (2, 4, 2)),  # one A for all
    ((2, 3, 4), (2, 4, 2)),
    ((2, 1, 3, 4), (3, 4, 2)),  # each serves some
    ((1, 3, 4), (2, 4, 1)),
]

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:FutureWarning")  # of torch's first jvp


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def own_gram(a: Tensor) -> Tensor:
    return a.mT @ a


def own_matmul(a: Tensor, b: Tensor) -> Tensor:
    return a @ b


def same(found: Tensor, true: Tensor) -> None:
    assert found.shape == true.shape and found.dtype == true.dtype
    torch.testing.assert_close(found, true, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", A, ids=str)
def test_gram_passes_the_checks(shape: tuple[int, ...]) -> None:
    a = randn(*shape).requires_grad_()
    same(gram(a), a.mT @ a)
    assert gradcheck(gram, a, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True)
    assert gradgradcheck(gram, a, check_fwd_over_rev=True, check_rev_over_rev=True, check_batched_grad=True)


@pytest.mark.parametrize("shapes", AB, ids=str)
def test_matmul_passes_the_checks(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    a, b = randn(*shapes[0]).requires_grad_(), randn(*shapes[1], seed=1).requires_grad_()
    same(matmul(a, b), a @ b)
    assert gradcheck(matmul, (a, b), check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True)
    assert gradgradcheck(matmul, (a, b), check_fwd_over_rev=True, check_rev_over_rev=True, check_batched_grad=True)


def test_complex_matrices() -> None:
    a = randn(2, 1, 3, dtype=torch.complex128).requires_grad_()
    b = randn(3, 2, seed=1, dtype=torch.complex128).requires_grad_()
    assert gradcheck(matmul, (a, b), check_forward_ad=True) and gradgradcheck(matmul, (a, b))
    assert gradcheck(gram, a, check_forward_ad=True) and gradgradcheck(gram, a)


@pytest.mark.parametrize("shapes", [((0, 3), (3, 2)), ((2, 3, 0), (0, 2)), ((0, 2, 3), (3, 2))], ids=str)
def test_empty_matrices(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    a, b = randn(*shapes[0]).requires_grad_(), randn(*shapes[1], seed=1).requires_grad_()
    for found, true in ((gram(a), a.mT @ a), (matmul(a, b), a @ b)):
        same(found, true)
    gradients = torch.autograd.grad(gram(a).sum() + matmul(a, b).sum(), (a, b))
    for found, true in zip(gradients, torch.autograd.grad(own_gram(a).sum() + (a @ b).sum(), (a, b)), strict=True):
        same(found, true)


@pytest.mark.parametrize("shape", [(1, 10, 5), (2, 3, 4, 2)], ids=str)
def test_gram_closed_form_is_the_dense_jacobian(shape: tuple[int, ...]) -> None:
    a = randn(*shape)
    b = randn(*shape[:-2], shape[-1], shape[-1], seed=1)
    dense = jacrev(own_gram)(a).reshape(b.numel(), a.numel())
    [found] = vjp(gram, a)[1](b)
    same(found.flatten(), dense.T @ b.flatten())
    same(found, a @ (b + b.mT))
    da = randn(*shape, seed=2)
    same(jvp(gram, (a,), (da,))[1].flatten(), dense @ da.flatten())


def test_matmul_closed_form_is_the_dense_jacobian() -> None:
    a, b, c = randn(1, 8, 6), randn(1, 6, 4, seed=1), randn(1, 8, 4, seed=2)
    for found, dense in zip(vjp(matmul, a, b)[1](c), jacrev(own_matmul, (0, 1))(a, b), strict=True):
        same(found.flatten(), dense.reshape(c.numel(), -1).T @ c.flatten())


@pytest.mark.parametrize("dims", [(0, None), (None, 0), (0, 0), (2, 1), (-1, -3)], ids=str)
@pytest.mark.parametrize("leads", [((), ()), ((2,), ()), ((), (2,)), ((2,), (3, 2))], ids=str)
def test_vmap_of_matmul(dims: tuple[int | None, int | None], leads: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    matrices = []
    for dim, lead, shape, seed in zip(dims, leads, [(3, 4), (4, 2)], [0, 1], strict=True):
        matrix = randn(*([] if dim is None else [5]), *lead, *shape, seed=seed)
        matrices.append(matrix if dim is None else matrix.movedim(0, dim))
    same(vmap(matmul, dims)(*matrices), vmap(own_matmul, dims)(*matrices))

    def gradients(function: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, ...]:
        return vmap(grad(lambda a, b: function(a, b).sin().sum(), (0, 1)), dims)(*matrices)

    for found, true in zip(gradients(matmul), gradients(own_matmul), strict=True):
        same(found, true)


@pytest.mark.parametrize("transform", [jacrev, jacfwd, hessian])
def test_transforms_over_transforms(transform: Callable[..., Callable[..., Tensor]]) -> None:
    a, b = randn(2, 3, 4), randn(2, 4, 2, seed=1)
    same(vmap(transform(gram))(a), vmap(transform(own_gram))(a))
    same(vmap(transform(matmul))(a, b), vmap(transform(own_matmul))(a, b))
    same(vmap(vmap(gram))(a[None]), own_gram(a)[None])


def test_forward_mode_of_one_argument() -> None:
    a, b, da = randn(3, 4), randn(4, 2, seed=1), randn(3, 4, seed=2)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(a, da)
        same(forward_ad.unpack_dual(matmul(dual, b)).tangent, da @ b)
        same(forward_ad.unpack_dual(matmul(b.mT, dual.mT)).tangent, b.mT @ da.mT)
        assert forward_ad.unpack_dual(matmul(dual, b) + matmul(a, b)).tangent is not None


def test_only_what_is_asked_for_is_computed() -> None:
    a, b = randn(2, 3, 4).requires_grad_(), randn(4, 2, seed=1)
    matmul(a, b).sum().backward()
    assert a.grad is not None and b.grad is None


def test_gradients_under_autocast_have_the_dtype_of_the_matrices() -> None:
    a, b = randn(2, 8, 4).float().requires_grad_(), randn(4, 2, seed=1).float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        products = gram(a), matmul(a, b)
    assert {product.dtype for product in products} == {torch.bfloat16}
    found = torch.autograd.grad(sum(product.sum() for product in products), (a, b))
    true = torch.autograd.grad(own_gram(a).sum() + (a @ b).sum(), (a, b))
    for one, exact in zip(found, true, strict=True):
        assert one.dtype == torch.float32 and float((one - exact).norm() / exact.norm()) <= 2e-2


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        (((3,), (3, 2)), r"a has shape \[3\].*a.unsqueeze"),
        (((2, 3), (3,)), r"b has shape \[3\]"),
        (((2, 3), (4, 2)), r"3 columns.*4 rows"),
        (((2, 2, 3), (3, 3, 2)), "do not broadcast"),
    ],
)
def test_shapes_that_do_not_fit(shapes: tuple[tuple[int, ...], tuple[int, ...]], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        matmul(*(torch.ones(shape) for shape in shapes))
    with pytest.raises(ValueError, match="no matrix"):
        gram(torch.ones(3))
