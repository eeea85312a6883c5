"""Refuse graphs that would go on to be wrong when parameters, inputs or random numbers change."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from hessfree.linearization.base import LinearizationError
from hessfree.linearization.traced.network import Network
from hessfree.linearization.traced.nodes import A, is_random, mutates

MASKS = {torch.bool, torch.uint8}


def check(recorded: fx.GraphModule, network: Network) -> list[Constant]:
    """Check that a graph is a function of its placeholders alone.

    Args:
        recorded: What `capture` returned.
        network: What it was made of.

    Returns:
        The tensors that the graph holds on to: attributes of modules, to be compared at every use.

    Raises:
        LinearizationError: The graph writes into its arguments, has shapes that depend on data, draws random
            numbers in a backward pass or from a generator of its own, or holds a tensor that may change.
    """
    graph = recorded.graph
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    backward = False
    for node in graph.nodes:
        backward = backward or placeholders[-1] in node.all_input_nodes
        if mutates(node):
            raise LinearizationError(f"the network writes into its inputs or parameters ({node.target})")
        if _shape_depends_on_data(node):
            raise LinearizationError(f"the shape of what {node.target} returns depends on the data")
        if is_random(node) and backward:
            raise LinearizationError(f"{node.target} draws random numbers in the backward pass (a checkpoint?)")
        if any(isinstance(leaf, torch.Generator) for leaf in tree_leaves((node.args, node.kwargs))):
            raise LinearizationError(f"{node.target} uses a Generator of the network's own")
    return [found for node in graph.nodes if node.op == "get_attr" and (found := _constant(recorded, node, network))]


class Constant:
    """A tensor that a module holds as a plain attribute, neither parameter nor buffer, and a graph uses.

    It must be the same object with the same contents when the graph is used again.
    """

    def __init__(self, holder: dict[str, Any], name: str, leaf: int, tensor: Tensor) -> None:
        """Take the attributes of the module, the attribute's name, the leaf in it and the tensor there."""
        self._holder, self._name, self._leaf, self._tensor = holder, name, leaf, tensor
        self._version = tensor._version

    def unchanged(self) -> bool:
        """Tell whether the attribute still holds the same tensor, unwritten."""
        leaves = tree_leaves(self._holder.get(self._name))
        return (
            self._leaf < len(leaves) and leaves[self._leaf] is self._tensor and self._tensor._version == self._version
        )


def _shape_depends_on_data(node: fx.Node) -> bool:
    if torch.Tag.dynamic_output_shape not in getattr(node.target, "tags", ()):
        return False
    if node.target is A.index.Tensor:  # static unless a mask is among the indices
        return any(index.meta["val"].dtype in MASKS for index in node.all_input_nodes[1:])
    return True


def _constant(recorded: fx.GraphModule, node: fx.Node, network: Network) -> Constant | None:
    tensor = getattr(recorded, str(node.target))
    if not isinstance(tensor, Tensor):
        raise LinearizationError(f"the network uses a {type(tensor).__name__} of its own")
    if all(user.target is A.lift_fresh_copy.default for user in node.users):
        return None  # a literal, written out in the code of the network
    storage = tensor.untyped_storage()._cdata
    for part in network.module.modules():
        for name, value in part.__dict__.items():
            if name.startswith("_") or not isinstance(value, Tensor | list | tuple | dict):
                continue
            for i, leaf in enumerate(tree_leaves(value)):
                if isinstance(leaf, Tensor) and not leaf.requires_grad and leaf.untyped_storage()._cdata == storage:
                    return Constant(part.__dict__, name, i, leaf)
    raise LinearizationError(
        "the network uses a tensor that is neither parameter, buffer, input nor attribute of a module, and may change"
    )
