"""How the outputs z use a parameter, read off the autograd graph."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from hessfree.recording import Output


class Use(NamedTuple):
    """One place in the graph where something goes in.

    Attributes:
        node: The graph node that takes it.
        argument: As which of its arguments.
        output: Which output of the node before it is taken.
    """

    node: Node
    argument: int
    output: int


class Uses:
    """The autograd graph of some outputs, turned round: from each node to those that take what it gives.

    It is read once, in time proportional to the graph.

    Attributes:
        nodes: All nodes of the graph.
    """

    def __init__(self, outputs: Sequence[Output]) -> None:
        """Read the graph.

        Args:
            outputs: Where it ends.
        """
        self._ends = {(o.edge.node, o.edge.output_nr) for o in outputs}
        self._by_node: dict[Node, list[Use]] = {}
        stack = [node for node, _ in self._ends]
        self.nodes = seen = set(stack)
        while stack:
            node = stack.pop()
            for argument, (source, number) in enumerate(node.next_functions):
                if source is None:
                    continue
                self._by_node.setdefault(source, []).append(Use(node, argument, number))
                if source not in seen:
                    seen.add(source)
                    stack.append(source)

    def of(self, node: Node) -> Sequence[Use]:
        """Return where the outputs of `node` go."""
        return self._by_node.get(node, ())

    def pass_by(self, parameter: Tensor, edges: Iterable[GradientEdge]) -> bool:
        """Tell whether `parameter` reaches the outputs by a way that goes through none of `edges`.

        A layer's curvature is s aᵀ, with s the gradient at what it returned, only where all of its parameter's
        influence goes through what it returned. It does not where the loss holds a derivative in the layer's input
        (there the weight is a factor of the backward pass too), nor where the weight is used by hand elsewhere.

        Args:
            parameter: A leaf of the graph.
            edges: What the layer's calls returned.

        Returns:
            Whether there is such a way.
        """
        closed = {(e.node, e.output_nr) for e in edges}
        stack = [get_gradient_edge(parameter).node]
        seen = set(stack)
        while stack:
            node = stack.pop()
            if any(end[0] is node and end not in closed for end in self._ends):
                return True
            for use in self.of(node):
                if (node, use.output) not in closed and use.node not in seen:
                    seen.add(use.node)
                    stack.append(use.node)
        return False
