"""Add what a product is added to inside the product."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from hessfree.linearization.traced.nodes import (
    A,
    calls,
    dependents,
    dtype,
    first,
    like,
    numel,
    remove_dead,
    replace,
    shape,
)

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
            if not (isinstance(product, fx.Node) and isinstance(other, fx.Node)) or product is other:
                continue
            other = first(other) if other.target is A.expand.default else other
            with graph.inserting_before(node):
                fused = _fuse(node, product, other)
            if fused is not None:
                replace(node, fused)
                break
    remove_dead(graph)


def _fuse(node: fx.Node, product: fx.Node, other: fx.Node) -> fx.Node | None:
    """Return what computes `node` = `product` + `other` in one call, or None."""
    if len(product.users) != 1 or shape(product) != shape(node) or shape(other) is None:
        return None
    if not dtype(product) == dtype(other) == dtype(node):
        return None
    graph = node.graph
    if product.target in FUSED:
        sizes = torch.broadcast_shapes(shape(product) or (), shape(other) or ())
        call = (FUSED[product.target], (other, *product.args))
        return like(graph.call_function(*call), node) if tuple(sizes) == shape(node) else None
    if product.target is A.convolution.default and product.args[2] is None and _is_bias(other, node, 1):
        bias = _flat(other)
        return like(graph.call_function(product.target, (*product.args[:2], bias, *product.args[3:])), node)
    if product.target is A.add.Tensor and not product.kwargs and _is_bias(other, node, 1):
        for summand, rest in (product.args, product.args[::-1]):  # the bias goes into one of two convolutions
            fused = _fuse(node, summand, other) if calls(summand, {A.convolution.default}) else None
            if fused is not None:
                return like(graph.call_function(A.add.Tensor, (fused, rest)), node)
    # a linear layer of more than two dimensions: its matrix product is seen through a reshape
    if product.target is A.reshape.default and _is_bias(other, node, -1):
        inner = first(product)
        if calls(inner, {A.mm.default}) and len(inner.users) == 1 and (shape(inner) or ())[-1] == numel(other):
            sums = like(graph.call_function(A.addmm.default, (_flat(other), *inner.args)), inner)
            return like(graph.call_function(A.reshape.default, (sums, product.args[1])), node)
    return None


def _is_bias(other: fx.Node, node: fx.Node, axis: int) -> bool:
    """Tell whether `other` varies along one axis of `node` only, and has an entry for each place there."""
    sizes = shape(node) or ()
    if len(sizes) < 2:
        return False
    aligned = [1] * len(sizes)
    aligned[axis] = sizes[axis]
    own = shape(other) or ()
    return [1] * (len(sizes) - len(own)) + list(own) == aligned


def _flat(node: fx.Node) -> fx.Node:
    sizes = (numel(node),)
    if shape(node) == sizes:
        return node
    return like(node.graph.call_function(A.reshape.default, (node, list(sizes))), node, sizes)
