"""Gram matrices of Jacobians, in the space of the outputs: J(x1) J(x2)ᵀ, the (neural tangent) kernel matrix."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from hessfree.losses import Form
from hessfree.operators.base import LinearOperator
from hessfree.operators.factored_root import FactoredRoot
from hessfree.operators.gauss_newton import GaussNewton
from hessfree.operators.root import ProductRoot

GramForm = Literal["auto", "layers", "jacobian", "products"]


@dataclasses.dataclass(frozen=True, eq=False)
class Side:
    """BᵀJ `[Z, P]` of one set of inputs.

    Attributes:
        operator: The Gauss-Newton matrix that J is taken from.
        root: H = B Bᵀ; None for B the identity.
    """

    operator: GaussNewton
    root: Form | None = None

    @functools.cached_property
    def products(self) -> ProductRoot:
        """BᵀJ by products."""
        return ProductRoot(self.operator.linearization, self.operator.size, self.root)

    @functools.cached_property
    def by_layers(self) -> FactoredRoot | None:
        """BᵀJ in factors at Linear layers; None where it cannot be held."""
        return self.operator.held_root(self.root)

    @functools.cached_property
    def by_rows(self) -> FactoredRoot | None:
        """BᵀJ formed; None where it cannot be held."""
        return self.operator.held_root(self.root, factor=False)


class JacobianGram(LinearOperator):
    """K = J(x1) J(x2)ᵀ `[Z1, Z2]`, or B₁ᵀ J(x1) J(x2)ᵀ B₂ with square roots of the loss's Hessian, H = B Bᵀ.

    J is the Jacobian of the outputs z in the parameters, outputs in the order of the flattened z. Without x2 the two
    sides are the same, and K is symmetric and positive semidefinite, with the same nonzero eigenvalues as JᵀJ or
    JᵀHJ: the matrix of the dual problem, smaller where Z < P. With x2 it is a cross block of the Gram matrix of both.

    A product is one Jᵀu and one Jv, and J is never formed. The matrix itself comes by one of three forms:

    - "layers": K = Σ over layers of (S₁ S₂ᵀ) ∘ (A₁ A₂ᵀ + 1), with the layers' inputs A `[N, in]` and the gradients S
      `[N·C, out]` at what they returned. It takes C backward passes, for C outputs a sample, and J is never formed.
      Parameters that are not in a Linear layer called once on plain samples have rows of J.
    - "jacobian": J is formed, by C backward passes where layers keep samples apart, and multiplied by itself.
    - "products": rows of J are formed a bounded number at a time and met by the other side's, or by its products.

    Attributes:
        dtype: Dtype of its vectors.
        device: Device of its vectors.
        left: Bᵀ J of x1.
        right: Bᵀ J of x2; the same object as `left` where there is no x2.
        form: "layers", "jacobian" or "products"; "auto" is the first that the network and memory allow.
    """

    def __init__(self, left: Side, right: Side | None = None, form: GramForm = "auto") -> None:
        """Compose the operator.

        Args:
            left: The side of x1.
            right: The side of x2, of the same parameters; None for x1 again.
            form: How to form the matrix.

        Raises:
            ValueError: There is no such form.
        """
        if form not in get_args(GramForm):
            raise ValueError(f"form={form!r} must be 'auto', 'layers', 'jacobian' or 'products'")
        space = left.operator.linearization.space
        self.dtype, self.device = space.dtype, space.device
        self.left, self.right = left, left if right is None else right
        self.form: GramForm = form

    @classmethod
    def from_model(
        cls,
        model: nn.Module,
        inputs: Any,
        other_inputs: Any = None,
        *,
        linearization: str = "auto",
        microbatch: int | None = None,
        form: GramForm = "auto",
    ) -> JacobianGram:
        """Return J(inputs) J(other_inputs)ᵀ of `model` at its present parameters.

        Args:
            model: A module with parameters that require grad.
            inputs: x1: a tensor, a tuple of positional arguments, or a dict of keyword arguments.
            other_inputs: x2, likewise; None for x1 again.
            linearization: The back end, as for `GaussNewton`.
            microbatch: Evaluate each side on at most so many samples at a time, as for `GaussNewton.from_loss`:
                memory is that of one chunk, and a product costs a forward pass of each side more. The matrix is then
                formed by products.
            form: How to form the matrix: "auto", "layers", "jacobian" or "products" (see the class).

        Returns:
            The operator.

        Raises:
            ValueError: See `GaussNewton.from_model`, and `GaussNewton.from_loss` for `microbatch`.
            LinearizationError: Likewise.
        """

        def side(x: Any) -> Side:
            if microbatch is None:
                return Side(GaussNewton.from_model(model, x, linearization=linearization))
            # a loss is what chunks are made for; this one is curved in every output, and only its J is used
            return Side(
                GaussNewton.from_loss(model, _half_square, x, None, linearization=linearization, microbatch=microbatch)
            )

        left = side(inputs)
        return cls(left, None if other_inputs is None else side(other_inputs), form)

    @classmethod
    def from_loss(
        cls,
        model: nn.Module,
        loss_fn: Callable[[Any, Any], Tensor],
        inputs: Any,
        targets: Any,
        other_inputs: Any = None,
        other_targets: Any = None,
        *,
        linearization: str = "auto",
        microbatch: int | None = None,
        form: GramForm = "auto",
    ) -> JacobianGram:
        """Return B₁ᵀ J(inputs) J(other_inputs)ᵀ B₂ for the loss `loss_fn(model(inputs), targets)`.

        Each side has the scale of its own loss: for means over N1 and N2 samples, K holds 1/√(N1·N2).

        Args:
            model: A module with parameters that require grad.
            loss_fn: Takes what the model returned, and targets; returns a scalar.
            inputs: x1: a tensor, a tuple of positional arguments, or a dict of keyword arguments.
            targets: Passed on to `loss_fn` with what the model returned for x1.
            other_inputs: x2, like x1; None for x1 again.
            other_targets: Passed on to `loss_fn` with what the model returned for x2.
            linearization: The back end, as for `GaussNewton`.
            microbatch: Evaluate each side on at most so many samples at a time, as for `GaussNewton.from_loss`:
                memory is that of one chunk, and a product costs a forward pass of each side more. The matrix is then
                formed by products.
            form: How to form the matrix: "auto", "layers", "jacobian" or "products" (see the class).

        Returns:
            The operator. B is a square root of H, B Bᵀ = H, and not always the symmetric one.

        Raises:
            ValueError: See `GaussNewton.from_loss`; or the Hessian in the outputs has no square root; or the loss uses
                parameters directly.
        """

        def side(x: Any, y: Any) -> Side:
            found = GaussNewton.from_loss(model, loss_fn, x, y, linearization=linearization, microbatch=microbatch)
            return Side(found, found.root_form("JacobianGram"))

        left = side(inputs, targets)
        return cls(left, None if other_inputs is None else side(other_inputs, other_targets), form)

    @property
    def shape(self) -> tuple[int, int]:
        """(Z1, Z2)."""
        return self.left.products.count, self.right.products.count

    def matvec(self, v: Tensor) -> Tensor:
        """Return K v `[Z1]` for `v` `[Z2]`."""
        return self.left.products.matvec(self.right.products.rmatvec(v))

    def rmatvec(self, u: Tensor) -> Tensor:
        """Return Kᵀ u `[Z2]` for `u` `[Z1]`."""
        return self.right.products.matvec(self.left.products.rmatvec(u))

    def to_dense(self) -> Tensor:
        """Return the matrix `[Z1, Z2]`.

        Returns:
            The matrix, exactly symmetric where the two sides are the same.

        Raises:
            ValueError: `form` asks for what the network or memory does not allow.
        """
        held = self._held()
        dense = None if held is None else _ordered(*held)
        if dense is None:
            self._check("the two sides hold their parameters in different ways")
            dense = self.left.products.times(self.right.products)
            return 0.5 * (dense + dense.T) if self.left is self.right else dense
        return dense

    def diagonal(self) -> Tensor:
        """Return the diagonal `[min(Z1, Z2)]`: the inner products of rows of both sides, a bounded number at a time."""
        if self.left is self.right:
            held = self._held()
            if held is not None:
                root = held[0]
                assert root.order is not None
                return torch.empty_like(root.diagonal()).index_copy_(0, root.order, root.diagonal())
            return torch.cat([rows.square_().sum(1) for rows in self.left.products.rows()])
        pairs = zip(self.left.products.rows(), self.right.products.rows(), strict=False)
        return torch.cat([torch.linalg.vecdot(a[: len(b)], b[: len(a)]) for a, b in pairs])

    def _held(self) -> tuple[FactoredRoot, FactoredRoot] | None:
        """Return both sides as they are held, if they are to be."""
        if self.form == "products":
            return None
        left, right = (s.by_rows if self.form == "jacobian" else s.by_layers for s in (self.left, self.right))
        if left is not None and right is not None:
            return left, right
        self._check(
            "the graph of the outputs is not there (microbatch), they share no dimension of samples, or J does not fit"
        )
        return None

    def _check(self, why: str) -> None:
        if self.form in {"layers", "jacobian"}:
            raise ValueError(f"form={self.form!r} cannot be used: {why}; use form='products' or 'auto'")


def _ordered(left: FactoredRoot, right: FactoredRoot) -> Tensor | None:
    """Return U Vᵀ with rows and columns in the order of the flat outputs; None where the two do not fit."""
    if left is right:
        gram = left.gram().tril_()
        gram += gram.tril(-1).T
    else:
        product = left.times(right)
        if product is None:
            return None
        gram = product
    assert left.order is not None and right.order is not None
    out = torch.empty_like(gram)
    out[left.order.unsqueeze(1), right.order] = gram
    return out


def _half_square(outputs: Any, _: None) -> Tensor:
    floating = [t for t in tree_leaves(outputs) if isinstance(t, Tensor) and t.requires_grad and not t.is_complex()]
    return 0.5 * torch.stack([t.square().sum() for t in floating]).sum()
