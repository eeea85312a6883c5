"""The part of a recorded loss behind the network's outputs: L = ell(z, theta), with z held as a variable.

Autograd alone would give total derivatives: the gradient at one output would include what flows through
another one that depends on it, and the gradient at a parameter would include all of the network. Here the
flow is stopped at every z: a pre-hook on its graph node turns the incoming gradient into "undefined" after
autograd has captured it, and autograd passes an undefined gradient on for free.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from hessfree.recording.autocast import autocast_as
from hessfree.recording.calls import Output
from hessfree.recording.leaf_hooks import leaf_hooks_off
from hessfree.recording.twice import twice_differentiable


class Tail:
    """First and second derivatives of ell in the outputs z and in the parameters it uses directly.

    Attributes:
        outputs: The z.
        gradients: d ell/d z, one an output, with graph; None where ell does not use that output, or all of them after
            `forget_values`.
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
        self._device, self._params = loss.device, params
        self._leaves = [get_gradient_edge(p) for p in params]
        # what the loss reaches is read off the graph: a gradient of zeros would not tell, since autograd
        # feeds custom functions with zeros for what is undefined, and they hand zeros on
        reached = set(walk(get_gradient_edge(loss), _stops(self.outputs)))
        self._used = [i for i, o in enumerate(self.outputs) if (o.edge.node, o.edge.output_nr) in reached]
        self._direct = [i for i, leaf in enumerate(self._leaves) if (leaf.node, leaf.output_nr) in reached]
        self.gradients, self.direct = self._differentiate([loss], None, create_graph=True)
        # edges, so that products need no values
        self._sources = [_source(t) for t in self.gradients + self.direct]
        self._coupled: bool | None = None

    @property
    def reach(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Numbers of the outputs, and of the parameters, that the loss uses without passing through an output."""
        return tuple(self._used), tuple(self._direct)

    @property
    def has_direct(self) -> bool:
        """Whether ell uses some parameter directly (a weight penalty, a bare Parameter)."""
        return any(t is not None for t in self.direct)

    @property
    def linear(self) -> bool:
        """Whether every first derivative is constant: ell has no second derivative at all."""
        return not any(self._sources)

    @property
    def coupled(self) -> bool:
        """Whether the direct gradient depends on z: then ell's Hessian has mixed blocks."""
        if self._coupled is None:
            sources = [t for t in self.direct if t is not None and t.requires_grad]
            mixed, _ = self._differentiate(sources, [torch.ones_like(t) for t in sources])
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
        along_z, along_theta = self._sources[: len(self.outputs)], self._sources[len(self.outputs) :]
        for known, factors in ((along_z, w), (along_theta, v)):
            for source, f in zip(known, factors if factors is not None else (), strict=factors is not None):
                if source is not None:
                    sources.append(source[0])
                    weights.append(f.to(source[1]))
        return self._differentiate(sources, weights)

    def forget_values(self) -> None:
        """Let the numbers in `gradients` be freed, where only products are wanted: each is as large as an output."""
        self.gradients = [None] * len(self.outputs)

    def _differentiate(
        self, sources: Sequence[Any], weights: Sequence[Tensor] | None, create_graph: bool = False
    ) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """Return the derivatives of `sources` in the outputs and in the parameters, with all z held as variables."""
        along_z: list[Tensor | None] = [None] * len(self.outputs)
        along_theta: list[Tensor | None] = [None] * len(self._leaves)
        targets = [self.outputs[i].edge for i in self._used] + [self._leaves[i] for i in self._direct]
        if not sources or not targets:
            return along_z, along_theta
        plain = autocast_as((), self._device)
        with _stopped_at(self.outputs), twice_differentiable(), plain, leaf_hooks_off(self._params):
            found = torch.autograd.grad(
                sources, targets, weights, retain_graph=True, create_graph=create_graph, allow_unused=True
            )
        for i, t in zip(self._used, found, strict=False):
            along_z[i] = t
        for i, t in zip(self._direct, found[len(self._used) :], strict=True):
            along_theta[i] = t
        return along_z, along_theta


def _source(gradient: Tensor | None) -> tuple[GradientEdge, torch.dtype] | None:
    if gradient is None or not gradient.requires_grad:
        return None
    return get_gradient_edge(gradient), gradient.dtype


def walk(edge: GradientEdge, stops: Mapping[Node, set[int]]) -> Iterator[tuple[Node, int]]:
    """Walk the autograd graph from `edge` towards the leaves.

    Args:
        edge: Where to begin.
        stops: Outputs of nodes, by number, behind which not to go.

    Yields:
        Each edge that is reached, once: a node and the number of its output.
    """
    seen, entered = set(), set()
    stack = [(edge.node, edge.output_nr)]
    while stack:
        node, number = stack.pop()
        if (node, number) in seen:
            continue
        seen.add((node, number))
        yield node, number
        if number not in stops.get(node, ()) and node not in entered:
            entered.add(node)
            stack.extend((n, i) for n, i in node.next_functions if n is not None)


def leaves_of(loss: Tensor) -> list[Tensor]:
    """Return every leaf tensor whose gradient a backward pass from `loss` fills."""
    nodes: list[Any] = [node for node, _ in walk(get_gradient_edge(loss), {})]
    return [node.variable for node in nodes if node.name() == "torch::autograd::AccumulateGrad"]


def _stops(outputs: Sequence[Output]) -> dict[Node, set[int]]:
    stops: dict[Node, set[int]] = {}
    for o in outputs:
        stops.setdefault(o.edge.node, set()).add(o.edge.output_nr)
    return stops


class _stopped_at:  # noqa: N801 - reads as a phrase in a with statement
    """While entered, gradients are captured at the outputs and go no further."""

    def __init__(self, outputs: Sequence[Output]) -> None:
        self._at = _stops(outputs)
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
