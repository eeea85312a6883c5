"""Add what a matrix product is added to inside the matrix product."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from hessfree.linearization.traced.nodes import A, dependents, dtype, first, like, remove_dead, replace, shape

FUSED: dict[Any, Any] = {A.mm.default: A.addmm.default, A.bmm.default: A.baddbmm.default}


def fuse_additions(graph: fx.Graph, tangents: list[fx.Node]) -> None:
    """Turn a b + c into one call; only in the linear maps, so that z keeps every bit.

    Args:
        graph: A clean graph.
        tangents: The placeholders of v and u.
    """
    varying = dependents(graph, tangents)
    for node in list(graph.nodes):
        if node.target is not A.add.Tensor or node.kwargs or node not in varying:
            continue
        for product, other in (node.args[::-1], node.args):
            if isinstance(product, fx.Node) and isinstance(other, fx.Node) and _fits(node, product, other):
                base = first(other) if other.target is A.expand.default else other
                with graph.inserting_before(node):
                    sum_of_both = like(graph.call_function(FUSED[product.target], (base, *product.args)), node)
                replace(node, sum_of_both)
                break
    remove_dead(graph)


def _fits(node: fx.Node, product: fx.Node, other: fx.Node) -> bool:
    if product.target not in FUSED or len(product.users) != 1 or product is other or shape(other) is None:
        return False
    same_dtype = dtype(product) == dtype(other) == dtype(node)
    same_shape = shape(product) == shape(node) == tuple(
        torch.broadcast_shapes(shape(product) or (), shape(other) or ())
    )
    return same_dtype and same_shape
