"""Gram matrices of Jacobians, in the space of the outputs: J(x1) J(x2)ᵀ, the (neural tangent) kernel matrix."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from hessfree.linearization import Linearization
from hessfree.losses import Form
from hessfree.operators.base import LinearOperator
from hessfree.operators.gauss_newton import GaussNewton
from hessfree.operators.rows import at_once, unit_rows


@dataclasses.dataclass(frozen=True, eq=False)
class Side:
    """BᵀJ `[Z, P]` of one set of inputs, by products.

    Attributes:
        linearization: J.
        size: P.
        root: H = B Bᵀ; None for B the identity.
    """

    linearization: Linearization
    size: int
    root: Form | None = None

    @property
    def count(self) -> int:
        """Z."""
        return self.linearization.space.size

    def jvp(self, v: Tensor) -> Tensor:
        """Return BᵀJ v `[Z]` for `v` `[P]`."""
        jv = self.linearization.jvp(v)
        return jv if self.root is None else self.root.transposed_root(jv)

    def vjp(self, u: Tensor) -> Tensor:
        """Return JᵀB u `[P]` for `u` `[Z]`."""
        return self.linearization.vjp(u if self.root is None else self.root.root(u))

    def rows(self) -> Iterator[Tensor]:
        """Yield the rows of BᵀJ in order, in chunks `[R, P]` of bounded size."""
        for units in unit_rows(self.linearization.space, self.size):
            roots = units if self.root is None else torch.stack([self.root.root(unit) for unit in units])
            yield self.linearization.vjps(roots)


class JacobianGram(LinearOperator):
    """K = J(x1) J(x2)ᵀ `[Z1, Z2]`, or B₁ᵀ J(x1) J(x2)ᵀ B₂ with square roots of the loss's Hessian, H = B Bᵀ.

    J is the Jacobian of the outputs z in the parameters, outputs in the order of the flattened z. Without x2 the two
    sides are the same, and K is symmetric and positive semidefinite, with the same nonzero eigenvalues as JᵀJ or
    JᵀHJ: the matrix of the dual problem, smaller where Z < P. With x2 it is a cross block of the Gram matrix of both.

    A product is one Jᵀu and one Jv, and J is never formed.

    Attributes:
        dtype: Dtype of its vectors.
        device: Device of its vectors.
        left: Bᵀ J of x1.
        right: Bᵀ J of x2; the same object as `left` where there is no x2.
    """

    def __init__(self, left: Side, right: Side | None = None) -> None:
        """Compose the operator.

        Args:
            left: The side of x1.
            right: The side of x2, of the same parameters; None for x1 again.
        """
        space = left.linearization.space
        self.dtype, self.device = space.dtype, space.device
        self.left, self.right = left, left if right is None else right

    @classmethod
    def from_model(
        cls,
        model: nn.Module,
        inputs: Any,
        other_inputs: Any = None,
        *,
        linearization: str = "auto",
        microbatch: int | None = None,
    ) -> JacobianGram:
        """Return J(inputs) J(other_inputs)ᵀ of `model` at its present parameters.

        Args:
            model: A module with parameters that require grad.
            inputs: x1: a tensor, a tuple of positional arguments, or a dict of keyword arguments.
            other_inputs: x2, likewise; None for x1 again.
            linearization: The back end, as for `GaussNewton`.
            microbatch: Evaluate each side on at most so many samples at a time, as for `GaussNewton.from_loss`:
                memory is that of one chunk, and a product costs a forward pass of each side more.

        Returns:
            The operator.

        Raises:
            ValueError: See `GaussNewton.from_model`, and `GaussNewton.from_loss` for `microbatch`.
            LinearizationError: Likewise.
        """

        def side(x: Any) -> Side:
            if microbatch is None:
                return _side(GaussNewton.from_model(model, x, linearization=linearization))
            # a loss is what chunks are made for; this one is curved in every output, and only its J is used
            return _side(
                GaussNewton.from_loss(model, _half_square, x, None, linearization=linearization, microbatch=microbatch)
            )

        left = side(inputs)
        return cls(left) if other_inputs is None else cls(left, side(other_inputs))

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
                memory is that of one chunk, and a product costs a forward pass of each side more.

        Returns:
            The operator. B is a square root of H, B Bᵀ = H, and not always the symmetric one.

        Raises:
            ValueError: See `GaussNewton.from_loss`; or the Hessian in the outputs has no square root; or the loss uses
                parameters directly.
        """

        def side(x: Any, y: Any) -> Side:
            found = GaussNewton.from_loss(model, loss_fn, x, y, linearization=linearization, microbatch=microbatch)
            return _side(found, found.root_form("JacobianGram"))

        left = side(inputs, targets)
        return cls(left) if other_inputs is None else cls(left, side(other_inputs, other_targets))

    @property
    def shape(self) -> tuple[int, int]:
        """(Z1, Z2)."""
        return self.left.count, self.right.count

    def matvec(self, v: Tensor) -> Tensor:
        """Return K v `[Z1]` for `v` `[Z2]`."""
        return self.left.jvp(self.right.vjp(v))

    def rmatvec(self, u: Tensor) -> Tensor:
        """Return Kᵀ u `[Z2]` for `u` `[Z1]`."""
        return self.right.jvp(self.left.vjp(u))

    def to_dense(self) -> Tensor:
        """Return the matrix `[Z1, Z2]`.

        Rows of J are formed a bounded number at a time. They meet all of the rows of the left side at once where
        these are few enough to be held, else the left side's products.

        Returns:
            The matrix, exactly symmetric where the two sides are the same.
        """
        held = None
        if self.left.count <= at_once(self.left.size):
            held = torch.cat(list(self.left.rows()))
        columns = []
        for rows in self.right.rows():
            columns.append(torch.stack([self.left.jvp(row) for row in rows], 1) if held is None else held @ rows.T)
        dense = torch.cat(columns, 1).to(self.dtype)
        return 0.5 * (dense + dense.T) if self.left is self.right else dense

    def diagonal(self) -> Tensor:
        """Return the diagonal `[min(Z1, Z2)]`: the inner products of rows of both sides, a bounded number at a time."""
        if self.left is self.right:
            return torch.cat([rows.square_().sum(1) for rows in self.left.rows()])
        pairs = zip(self.left.rows(), self.right.rows(), strict=False)
        return torch.cat([torch.linalg.vecdot(a[: len(b)], b[: len(a)]) for a, b in pairs])


def _side(found: GaussNewton, root: Form | None = None) -> Side:
    return Side(found.linearization, found.size, root)


def _half_square(outputs: Any, _: None) -> Tensor:
    floating = [t for t in tree_leaves(outputs) if isinstance(t, Tensor) and t.requires_grad and not t.is_complex()]
    return 0.5 * torch.stack([t.square().sum() for t in floating]).sum()
