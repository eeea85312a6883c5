"""AᵀA and AB with the closed forms of their derivatives, as autograd Functions.

With ⟨X, Y⟩ = tr(XᵀY), the differential of AᵀA `[n, n]` in A `[m, n]` is d(AᵀA) = dAᵀA + AᵀdA = S + Sᵀ, S = AᵀdA. For a
cotangent B `[n, n]`, ⟨B, S + Sᵀ⟩ = ⟨B + Bᵀ, AᵀdA⟩ = ⟨A(B + Bᵀ), dA⟩, so that

    vjp: B ↦ A(B + Bᵀ) `[m, n]`        jvp: dA ↦ S + Sᵀ `[n, n]`,

one matrix product each. Autograd sees the product of two matrices, Aᵀ and A, and makes two of either. Likewise for AB,
d(AB) = dA·B + A·dB and C ↦ (CBᵀ, AᵀC). The dense Jacobians, `[n·n, m·n]` and `[m·p, m·n]` with their p for n, are never
needed: source of the forms is Giles 2008, "Collected matrix derivative results", sec. 2.2.

Both take any leading dimensions, both can be differentiated again (in reverse, forward, and one over the other), and
run under torch.func's transforms. Complex matrices are transposed, not conjugated.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function


def gram(a: Tensor) -> Tensor:
    """Return AᵀA, its derivatives in closed form.

    Args:
        a: A `[..., m, n]`.

    Returns:
        `[..., n, n]`. For A Aᵀ call `gram(a.mT)`.

    Raises:
        ValueError: If A has fewer than two dimensions.
    """
    _check_matrices(a=a)
    return _Gram.apply(a)


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """Return AB, its derivatives in closed form.

    Args:
        a: A `[..., m, n]`.
        b: B `[..., n, p]`; leading dimensions broadcast against A's.

    Returns:
        `[..., m, p]`.

    Raises:
        ValueError: If A or B has fewer than two dimensions, or their shapes do not fit.
    """
    _check_matrices(a=a, b=b)
    if a.shape[-1] != b.shape[-2]:
        raise ValueError(
            f"a {list(a.shape)} has {a.shape[-1]} columns and b {list(b.shape)} has {b.shape[-2]} rows: give as many"
        )
    try:
        torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    except RuntimeError:
        raise ValueError(
            f"the leading dimensions of a {list(a.shape)} and b {list(b.shape)} do not broadcast: "
            "give equal ones, or 1 where one matrix serves many"
        ) from None
    return _Matmul.apply(a, b)


def _check_matrices(**matrices: Tensor) -> None:
    for name, matrix in matrices.items():
        if matrix.dim() < 2:
            raise ValueError(
                f"{name} has shape {list(matrix.shape)} and is no matrix: give two dimensions or more, "
                f"a vector as one column, {name}.unsqueeze(-1)"
            )


class _Gram(Function):
    """A ↦ AᵀA."""

    @staticmethod
    def forward(a: Tensor) -> Tensor:
        return a.mT @ a

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, b: Tensor) -> Tensor:
        (a,) = ctx.saved_tensors
        b = b.to(a.dtype)  # lower under autocast
        return a.conj() @ (b + b.mT)

    @staticmethod
    def jvp(ctx: Any, da: Tensor) -> Tensor:
        (a,) = ctx.saved_tensors
        s = a.mT @ da
        return s + s.mT

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None], a: Tensor) -> tuple[Tensor, int]:
        (dim,) = in_dims
        assert dim is not None  # torch calls this only where some argument is mapped over
        return gram(a.movedim(dim, 0)), 0


class _Matmul(Function):
    """(A, B) ↦ AB."""

    @staticmethod
    def forward(a: Tensor, b: Tensor) -> Tensor:
        return a @ b

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)
        ctx.set_materialize_grads(False)  # a tangent that is missing costs no product with zeros

    @staticmethod
    def backward(ctx: Any, c: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        a, b = ctx.saved_tensors
        if c is None:
            return None, None
        c = c.to(a.dtype)  # lower under autocast
        da = _summed(c, b.mT.conj(), a) if ctx.needs_input_grad[0] else None
        db = _summed(a.mT.conj(), c, b) if ctx.needs_input_grad[1] else None
        return da, db

    @staticmethod
    def jvp(ctx: Any, da: Tensor | None, db: Tensor | None) -> Tensor | None:
        a, b = ctx.saved_tensors
        parts = ([] if da is None else [da @ b]) + ([] if db is None else [a @ db])
        return sum(parts[1:], start=parts[0]) if parts else None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, int | None], a: Tensor, b: Tensor) -> tuple[Tensor, int]:
        # the mapped dimension goes in front of as many leading ones as the other matrix has
        rank = max(one.dim() - (dim is not None) for one, dim in zip((a, b), in_dims, strict=True))
        a, b = (_in_front(one, dim, rank) for one, dim in zip((a, b), in_dims, strict=True))
        return matmul(a, b), 0


def _in_front(matrix: Tensor, dim: int | None, rank: int) -> Tensor:
    if dim is None:
        return matrix
    matrix = matrix.movedim(dim, 0)
    missing = rank + 1 - matrix.dim()
    return matrix.reshape(matrix.shape[0], *[1] * missing, *matrix.shape[1:])


def _summed(left: Tensor, right: Tensor, like: Tensor) -> Tensor:
    """Return the product, summed over the leading dimensions along which `like` was broadcast.

    Where one matrix served all, the sum is part of one large product: nothing `[..., m, n]` is made.
    """
    if like.shape[:-2].numel() == 1 and left.shape[:-2] == right.shape[:-2]:
        rows, inner = left.shape[-2], left.shape[:-2].numel() * left.shape[-1]
        return (left.mT.reshape(inner, rows).mT @ right.reshape(inner, right.shape[-1])).reshape(like.shape)
    return (left @ right).sum_to_size(like.shape)
