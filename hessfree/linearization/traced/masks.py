"""Keep of an activation no more than products look at: of a ReLU where it is open, of a pool's input the shape."""

from __future__ import annotations

import torch
from torch import fx

from hessfree.linearization.traced.cleaning import merge_duplicates
from hessfree.linearization.traced.nodes import A, dependents, dtype, first, is_view, like, replace, shape

# where the kernel of the pool's backward pass finds its way by the indices alone
BY_INDICES = {"cpu", "cuda"}


def keep_masks(graph: fx.Graph, tangents: list[fx.Node]) -> None:
    """Let large activations go that only a pool or a ReLU would keep alive.

    Args:
        graph: A clean graph.
        tangents: The placeholders of v and u.
    """
    varying = dependents(graph, tangents)
    for node in list(graph.nodes):
        if node.target is A.max_pool2d_with_indices_backward.default and node.meta["device"].type in BY_INDICES:
            _give_shape_alone(node, varying)
    for node in list(graph.nodes):
        if node.target is A.threshold_backward.default and first(node) in varying:
            _give_mask(node, varying)
    merge_duplicates(graph)


def _give_shape_alone(node: fx.Node, varying: set[fx.Node]) -> None:
    source = node.args[1]
    if not isinstance(source, fx.Node) or source in varying or shape(source) is None:
        return
    with node.graph.inserting_before(node):
        options = {"dtype": dtype(source), "device": source.meta["device"]}
        zero = like(node.graph.call_function(A.zeros.default, ([],), options), source, ())
        empty = like(node.graph.call_function(A.expand.default, (zero, list(shape(source) or ()))), source)
    node.args = (node.args[0], empty, *node.args[2:])


def _give_mask(node: fx.Node, varying: set[fx.Node]) -> None:
    gradient, output, threshold = node.args
    if not isinstance(output, fx.Node) or output in varying or _is_kept(output, varying):
        return
    with node.graph.inserting_before(node):
        opened = like(node.graph.call_function(A.gt.Scalar, (output, threshold)), output)
        opened.meta["dtype"] = torch.bool
        # a product, since `where` and `masked_fill` take four times as long on the CPU
        found = like(node.graph.call_function(A.mul.Tensor, (gradient, opened)), node)
    replace(node, found)


def _is_kept(fixed: fx.Node, varying: set[fx.Node]) -> bool:
    """Tell whether the products need more of `fixed` than where a ReLU was open."""
    for user in fixed.users:
        if user.op == "output":
            continue
        if user in varying and not (user.target is A.threshold_backward.default and user.args[1] is fixed):
            return True
        if user not in varying and (is_view(user) or user.target is A.reshape.default) and _is_kept(user, varying):
            return True
    return False
