"""Collect the factors that a tangent is multiplied by, so that what does not change is multiplied once."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from hessfree.linearization.traced.cleaning import merge_duplicates
from hessfree.linearization.traced.nodes import A, calls, dependents, dtype, first, like, numel, replace, shape

# pointwise and linear in the first argument: f(g, z) = g · f(1, z)
POINTWISE_BACKWARD = {
    A.elu_backward.default,
    A.gelu_backward.default,
    A.hardshrink_backward.default,
    A.hardsigmoid_backward.default,
    A.hardswish_backward.default,
    A.hardtanh_backward.default,
    A.leaky_relu_backward.default,
    A.log_sigmoid_backward.default,
    A.mish_backward.default,
    A.sigmoid_backward.default,
    A.silu_backward.default,
    A.softplus_backward.default,
    A.softshrink_backward.default,
    A.tanh_backward.default,
}  # not that of a ReLU: its mask is an output that is kept anyway, and a factor would be as large once more
PRODUCTS = {A.mul.Tensor, A.mul.Scalar}


def hoist_derivatives(graph: fx.Graph, tangents: list[fx.Node]) -> None:
    """Write the derivative of an activation as a factor that is computed once a linearisation.

    Args:
        graph: A clean graph.
        tangents: The placeholders of v and u.
    """
    varying = dependents(graph, tangents)
    for node in list(graph.nodes):
        if node.target not in POINTWISE_BACKWARD or first(node) not in varying:
            continue
        others = [n for n in node.all_input_nodes if n is not first(node)]
        if any(n in varying for n in others) or shape(first(node)) != shape(node):
            continue
        with graph.inserting_before(node):
            options = {"dtype": dtype(node), "device": node.meta["device"]}
            one = like(graph.call_function(A.ones.default, ([],), options), node, ())
            one = like(graph.call_function(A.expand.default, (one, list(shape(node) or ()))), node)  # costs no memory
            factor = like(graph.call_function(node.target, (one, *node.args[1:]), node.kwargs), node)
            product = like(graph.call_function(A.mul.Tensor, (first(node), factor)), node)
        replace(node, product)
    merge_duplicates(graph)


def regroup_products(graph: fx.Graph, tangents: list[fx.Node]) -> None:
    """Reorder products of several factors, so that what is fixed is multiplied once and small factors first.

    A product in a linear map has exactly one factor t that varies. (t · a) · b with fixed a and b becomes
    t · (a b), and (a_large · b_small) · t_small becomes a_large · (b_small · t_small); equal to rounding.

    Args:
        graph: A clean graph.
        tangents: The placeholders of v and u.
    """
    varying = dependents(graph, tangents)
    order = {node: i for i, node in enumerate(graph.nodes)}
    inner: set[fx.Node] = set()
    for root in reversed(list(graph.nodes)):  # from the root of each product down
        if root in inner or root not in varying or root.target not in PRODUCTS:
            continue
        factors: list[Any] = []
        inner.update(_collect(root, dtype(root), factors))
        if len(factors) > 2 and all(_multiplies(f, dtype(root)) for f in factors):
            tensors = sorted((f for f in factors if isinstance(f, fx.Node)), key=order.__getitem__)
            number = math.prod(f for f in factors if not isinstance(f, fx.Node))
            _rebuild(root, tensors, number, varying)
    merge_duplicates(graph)


def _collect(node: fx.Node, wanted: torch.dtype, factors: list[Any]) -> list[fx.Node]:
    """Append the factors of the product `node` to `factors`; return the inner products, used nowhere else."""
    nodes: list[fx.Node] = []
    for argument in node.args:
        if calls(argument, PRODUCTS) and len(argument.users) == 1 and dtype(argument) == wanted:
            nodes += [argument, *_collect(argument, wanted, factors)]
        else:
            factors.append(argument)
    return nodes


def _multiplies(factor: Any, wanted: torch.dtype) -> bool:
    if isinstance(factor, fx.Node):
        return shape(factor) is not None and dtype(factor) == wanted
    return isinstance(factor, int | float) and not isinstance(factor, bool)


def _rebuild(root: fx.Node, tensors: list[fx.Node], number: float, varying: set[fx.Node]) -> None:
    moving = [t for t in tensors if t in varying]
    fixed = [t for t in tensors if t not in varying]
    if len(moving) != 1:
        return
    tangent = moving[0]
    large = [t for t in fixed if numel(t) == numel(root)]
    small = [t for t in fixed if numel(t) != numel(root)]
    if numel(tangent) == numel(root):  # one multiplication for each product with J
        factor = _product(root, [*small, *large])
        product = _product(root, [tangent] if factor is None else [tangent, _times(root, factor, number)])
        number = 1 if factor is not None else number
    else:  # small factors first: no large fixed tensor is made
        factor = _product(root, small)
        light = _product(root, [tangent] if factor is None else [tangent, factor])
        assert light is not None
        product = _product(root, [_times(root, light, number), *large])
        number = 1
    assert product is not None
    root.replace_all_uses_with(_times(root, product, number))


def _product(root: fx.Node, factors: list[fx.Node]) -> fx.Node | None:
    """Return the product of `factors`, computed just before `root`; None for no factor."""
    product: fx.Node | None = None
    for factor in factors:
        if product is None:
            product = factor
            continue
        sizes = torch.broadcast_shapes(shape(product) or (), shape(factor) or ())
        with root.graph.inserting_before(root):
            product = like(root.graph.call_function(A.mul.Tensor, (product, factor)), root, sizes)
    return product


def _times(root: fx.Node, node: fx.Node, number: float) -> fx.Node:
    if number == 1:
        return node
    with root.graph.inserting_before(root):
        return like(root.graph.call_function(A.mul.Tensor, (node, number)), root, shape(node))
