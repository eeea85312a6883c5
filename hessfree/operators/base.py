"""A symmetric matrix seen through its products: `A @ v`, `A.to_dense()`, `A.diagonal()`."""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hessfree.linearization import call_model
from hessfree.recording import CallTree, Owners, Trace, trace_loss
from hessfree.vectors import ParameterVector


class LinearOperator(abc.ABC):
    """A symmetric P×P matrix that is never formed unless asked for.

    Attributes:
        size: P.
        dtype: Dtype of its vectors.
        device: Device of its vectors.
    """

    size: int
    dtype: torch.dtype
    device: torch.device

    @property
    def shape(self) -> tuple[int, int]:
        """(P, P)."""
        return self.size, self.size

    @abc.abstractmethod
    def matvec(self, v: Tensor) -> Tensor:
        """Return A v `[P]` for `v` `[P]`."""

    def __matmul__(self, v: Tensor) -> Tensor:
        """Return A v for a vector `[P]`, or A V column by column for a block `[P, K]`.

        Args:
            v: On the operator's device; other floating dtypes are cast.

        Returns:
            A tensor of the shape of `v`.

        Raises:
            ValueError: The shape does not fit.
        """
        if v.ndim not in {1, 2} or v.shape[0] != self.size:
            raise ValueError(
                f"cannot multiply a {self.size}x{self.size} operator by a tensor of shape {tuple(v.shape)}; "
                f"pass a vector [{self.size}] or a block [{self.size}, K]"
            )
        v = v.detach().to(self.dtype)
        if v.ndim == 1:
            return self.matvec(v)
        if v.shape[1] == 0:
            return v.clone()
        return torch.stack([self.matvec(column) for column in v.unbind(1)], 1)

    def quadratic_form(self, vectors: Tensor) -> Tensor:
        """Return V A Vᵀ `[K, K]` for rows V `[K, P]`: the curvature along and between a few directions."""
        products = torch.stack([self.matvec(v) for v in vectors])
        return vectors @ products.T

    def scaled(self, factor: float) -> LinearOperator:
        """Return `factor` times this operator."""
        return self if factor == 1 else _Scaled(self, factor)

    def to_dense(self) -> Tensor:
        """Return the matrix `[P, P]`, formed from P products and made exactly symmetric."""
        dense = self @ torch.eye(self.size, dtype=self.dtype, device=self.device)
        return 0.5 * (dense + dense.T)

    def diagonal(self) -> Tensor:
        """Return the exact diagonal `[P]`, from P products and without holding the matrix."""
        out = torch.empty(self.size, dtype=self.dtype, device=self.device)
        unit = torch.zeros_like(out)
        for i in range(self.size):
            unit[i] = 1
            out[i] = self.matvec(unit)[i]
            unit[i] = 0
        return out


class _Scaled(LinearOperator):
    def __init__(self, operator: LinearOperator, factor: float) -> None:
        self.size, self.dtype, self.device = operator.size, operator.dtype, operator.device
        self._operator, self._factor = operator, factor

    def matvec(self, v: Tensor) -> Tensor:
        return self._factor * self._operator.matvec(v)

    def quadratic_form(self, vectors: Tensor) -> Tensor:
        return self._factor * self._operator.quadratic_form(vectors)

    def to_dense(self) -> Tensor:
        return self._factor * self._operator.to_dense()

    def diagonal(self) -> Tensor:
        return self._factor * self._operator.diagonal()


def trace_model(
    model: nn.Module, loss_fn: Callable[[Any, Any], Tensor], inputs: Any, targets: Any, parameters: ParameterVector
) -> Trace:
    """Compute `loss_fn(model(inputs), targets)` and keep what a cut needs to know.

    Args:
        model: A module.
        loss_fn: Takes what the model returned, and `targets`; returns a scalar.
        inputs: A tensor, a tuple of positional arguments, or a dict of keyword arguments.
        targets: Passed on to `loss_fn`.
        parameters: The parameters.

    Returns:
        The loss with its graph and its calls.

    Raises:
        ValueError: The loss is no scalar tensor with a graph.
    """
    tree = CallTree(Owners(parameters), parameters.device, lambda _: True, lambda _: True)
    traced = trace_loss(lambda: loss_fn(call_model(model, inputs), targets), tree)
    loss = traced.loss
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        found = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)
        raise ValueError(f"loss_fn returned {found}, not a scalar tensor; reduce it first, for example loss.mean()")
    if not loss.requires_grad:
        raise ValueError(
            f"the loss does not depend on the parameters through what {type(model).__name__} returned; pass it to "
            "loss_fn without detach()"
        )
    return traced
