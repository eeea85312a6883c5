"""The part of a recorded loss behind the network's outputs: L = ell(z, theta), differentiated with z held as a variable.

Autograd alone would give total derivatives: the gradient at one output would include what flows through
another one that depends on it, and the gradient at a parameter would include all of the network. Here the
flow is stopped at every z: a pre-hook on its graph node turns the incoming gradient into "undefined" after
autograd has captured it, and autograd passes an undefined gradient on for free.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from hessfree.recording.calls import Output


class Tail:
    """First and second derivatives of ell in the outputs z and in the parameters it uses directly.

    Attributes:
        outputs: The z.
        gradients: d ell/d z, one an output, with graph; None where ell does not use that output.
        direct: d ell/d theta at fixed z, one a parameter, with graph; None where ell uses the parameter only
            through z.
    """

    def __init__(self, loss: Tensor, outputs: Sequence[Output], params: Sequence[Tensor]) -> None:
        """Differentiate `loss` once, keeping the graph.

        Args:
            loss: A scalar with its graph.
            outputs: Where the network ends.
            params: The parameters.
        """
        self.outputs = tuple(outputs)
        self._params = tuple(params)
        with _stopped_at(self.outputs):
            found = _grad([loss], [o.edge for o in self.outputs] + list(params), None, create_graph=True)
        found = [None if t is None or _is_zero(t) else t for t in found]
        self.gradients: list[Tensor | None] = found[: len(self.outputs)]
        self.direct: list[Tensor | None] = found[len(self.outputs) :]
        self._coupled: bool | None = None

    @property
    def has_direct(self) -> bool:
        """Whether ell uses some parameter directly (a weight penalty, a bare Parameter)."""
        return any(t is not None for t in self.direct)

    @property
    def linear(self) -> bool:
        """Whether every first derivative is constant: ell has no second derivative at all."""
        return not any(t is not None and t.requires_grad for t in self.gradients + self.direct)

    @property
    def coupled(self) -> bool:
        """Whether the direct gradient depends on z: then ell's Hessian has mixed blocks."""
        if self._coupled is None:
            sources = [t for t in self.direct if t is not None and t.requires_grad]
            self._coupled = False
            if sources and self.outputs:
                with _stopped_at(self.outputs):
                    mixed = _grad(sources, [o.edge for o in self.outputs], [torch.ones_like(t) for t in sources])
                self._coupled = any(t is not None for t in mixed)
        return self._coupled

    def product(
        self, w: Sequence[Tensor] | None, v: Sequence[Tensor] | None = None
    ) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """Multiply the Hessian of ell in (z, theta) by (w, v).

        Args:
            w: One tensor shaped like each output; None for zero.
            v: One tensor shaped like each parameter; None for zero.

        Returns:
            The part in z, one an output, and the part in theta, one a parameter; None for zero.
        """
        sources, weights = [], []
        for gradients, factors in ((self.gradients, w), (self.direct, v)):
            for g, f in zip(gradients, factors if factors is not None else (), strict=factors is not None):
                if g is not None and g.requires_grad:
                    sources.append(g)
                    weights.append(f.to(g.dtype))
        targets: list[Any] = [o.edge for o in self.outputs]
        if v is not None or self.has_direct:
            targets += list(self._params)
        if not sources:
            return [None] * len(self.outputs), [None] * len(self._params)
        with _stopped_at(self.outputs):
            found = _grad(sources, targets, weights)
        found += [None] * (len(self.outputs) + len(self._params) - len(found))
        return found[: len(self.outputs)], found[len(self.outputs) :]


class _stopped_at:  # noqa: N801 - reads as a phrase in a with statement
    """While entered, gradients are captured at the outputs and go no further."""

    def __init__(self, outputs: Sequence[Output]) -> None:
        self._at: dict[Node, set[int]] = {}
        for o in outputs:
            self._at.setdefault(o.edge.node, set()).add(o.edge.output_nr)
        self._handles: list[Any] = []

    def __enter__(self) -> None:
        for node, numbers in self._at.items():
            self._handles.append(node.register_prehook(_stopper(numbers)))

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()


def _stopper(numbers: set[int]) -> Any:
    def stop(gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        return tuple(None if i in numbers else g for i, g in enumerate(gradients))

    return stop


def _grad(
    outputs: Sequence[Tensor], inputs: Sequence[Any], weights: Sequence[Tensor] | None, create_graph: bool = False
) -> list[Tensor | None]:
    return list(
        torch.autograd.grad(
            outputs, inputs, weights, retain_graph=True, create_graph=create_graph, allow_unused=True
        )
    )


def _is_zero(t: Tensor) -> bool:
    """Tell a gradient that autograd made up (a custom function fed with undefined gradients) from a real one."""
    return not t.requires_grad and not bool(t.any())
