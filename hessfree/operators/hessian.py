"""The exact Hessian of a loss in the parameters, by products (Pearlmutter 1994)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from hessfree.operators.base import SymmetricOperator, trace_model
from hessfree.recording import Tail
from hessfree.vectors import ParameterVector


class Hessian(SymmetricOperator):
    """∇²L, symmetric but in general indefinite.

    Attributes:
        size: P.
        dtype: Dtype of its vectors.
        device: Device of its vectors.
    """

    def __init__(self, tail: Tail, parameters: ParameterVector) -> None:
        """Wrap a loss.

        Args:
            tail: The loss as a function of the parameters alone: a tail without outputs.
            parameters: The parameters.
        """
        self.size, self.dtype, self.device = parameters.size, parameters.dtype, parameters.device
        self._tail = tail
        self._parameters = parameters

    @classmethod
    def from_loss(cls, model: nn.Module, loss_fn: Callable[[Any, Any], Tensor], inputs: Any, targets: Any) -> Hessian:
        """Return the Hessian of `loss_fn(model(inputs), targets)` at the present parameters.

        Args:
            model: A module with parameters that require grad; vectors follow their order.
            loss_fn: Takes what the model returned, and `targets`; returns a scalar.
            inputs: A tensor, a tuple of positional arguments, or a dict of keyword arguments.
            targets: Passed on to `loss_fn`.

        Returns:
            The operator, in the loss's own scale.

        Raises:
            ValueError: The loss is not a scalar, or does not depend on the parameters.
        """
        parameters = ParameterVector([p for p in model.parameters() if p.requires_grad])
        tail = Tail(trace_model(model, loss_fn, inputs, targets, parameters).loss, (), parameters.params)
        if not tail.has_direct:
            raise ValueError(f"the loss does not depend on the parameters of {type(model).__name__}")
        return cls(tail, parameters)

    def matvec(self, v: Tensor) -> Tensor:
        """Return ∇²L v `[P]` for `v` `[P]`."""
        return self._parameters.flatten(self._tail.product(None, self._parameters.split(v))[1])
