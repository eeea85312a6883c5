"""Take out of a functional graph what tracing put in: aliases, copies, transposes of transposes, duplicates."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from hessfree.linearization.traced.nodes import (
    RESHAPES,
    A,
    calls,
    dtype,
    first,
    is_random,
    like,
    remove_dead,
    replace,
    shape,
)

ALIASES = {A.alias.default, A.detach.default}
SAME_IF_SAME_SHAPE = {A.expand.default, A.slice.Tensor}
INVERSE_OF_ITSELF = {A.t.default, A.neg.default}
# operators that update running statistics behind the back of their schema; in train mode these do not
# enter their results
BATCH_NORMS = {A.native_batch_norm.default, A.cudnn_batch_norm.default, A.miopen_batch_norm.default}
STRIDED = {A.as_strided.default, A.as_strided_scatter.default, A.as_strided_copy.default}
POINTWISE = {
    A.mul.Tensor,
    A.mul.Scalar,
    A.add.Tensor,
    A.add.Scalar,
    A.sub.Tensor,
    A.sub.Scalar,
    A.div.Tensor,
    A.div.Scalar,
    A.neg.default,
    A.pow.Tensor_Scalar,
    A.rsqrt.default,
    A.sqrt.default,
    A.reciprocal.default,
}


def clean(graph: fx.Graph) -> None:
    """Simplify `graph` without changing what it computes.

    Args:
        graph: A functional graph whose nodes were described (`nodes.describe`).
    """
    for node in list(graph.nodes):
        if node.target in ALIASES:
            replace(node, first(node))
        elif node.target in BATCH_NORMS:
            _forget_statistics(node)
    remove_dead(graph)
    # as_strided reads memory as it lies, so that its presence forbids to change how tensors lie
    if not any(node.target in STRIDED for node in graph.nodes):
        _remove_copies(graph)
        _sink_expands(graph)
    _cancel(graph)
    merge_duplicates(graph)


def merge_duplicates(graph: fx.Graph) -> None:
    """Compute only once what is computed twice from the same arguments; random draws stay apart."""
    seen: dict[Any, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op not in {"call_function", "get_attr"} or is_random(node):
            continue
        key = (node.op, node.target, _frozen(node.args), _frozen(node.kwargs))
        try:
            first = seen.setdefault(key, node)
        except TypeError:  # an argument that has no hash: not a node that matters
            continue
        if first is not node:
            replace(node, first)
    remove_dead(graph)


def _frozen(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return tuple(_frozen(v) for v in value)
    if isinstance(value, dict):
        return tuple((k, _frozen(v)) for k, v in value.items())
    return type(value), value  # 1, 1.0 and True are equal, and give results of different dtypes


def _forget_statistics(node: fx.Node) -> None:
    place = 3  # the mean, the variance, and whether to train
    if node.args[place + 2] is True:
        node.args = (*node.args[:place], None, None, *node.args[place + 2 :])


def _remove_copies(graph: fx.Graph) -> None:
    for node in list(graph.nodes):
        if node.target is A.clone.default and not node.kwargs:
            replace(node, first(node))
        elif node.target is A.copy.default:
            target, source = first(node), node.args[1]
            if isinstance(source, fx.Node) and shape(target) == shape(source) and dtype(target) == dtype(source):
                replace(node, source)
    remove_dead(graph)


def _cancel(graph: fx.Graph) -> None:
    for node in list(graph.nodes):
        if node.target in RESHAPES:
            node.target = A.reshape.default  # what was a view of a copy may now be a view of something else
            base = first(node)
            base = first(base) if base.target is A.reshape.default else base
            if shape(base) == shape(node):
                replace(node, base)
            else:
                node.args = (base, list(shape(node) or ()))
        elif node.target in INVERSE_OF_ITSELF:
            if first(node).target is node.target:
                replace(node, first(first(node)))
        elif node.target is A.transpose.int:
            if first(node).target is A.transpose.int and _axes(first(node)) == _axes(node):
                replace(node, first(first(node)))
        elif node.target in SAME_IF_SAME_SHAPE and shape(first(node)) == shape(node):
            replace(node, first(node))
    remove_dead(graph)


def _axes(node: fx.Node) -> set[int]:
    rank = len(shape(node) or ())
    return {axis % rank for axis in node.args[1:3] if isinstance(axis, int)}


def _sink_expands(graph: fx.Graph) -> None:
    """Let pointwise operations broadcast by themselves, so that small factors stay small."""
    for node in list(graph.nodes):
        if node.target not in POINTWISE or shape(node) is None:
            continue
        arguments = [_unexpanded(a) for a in node.args]
        if all(a is b for a, b in zip(arguments, node.args, strict=True)):
            continue
        node.args = tuple(arguments)
        small = torch.broadcast_shapes(*(shape(a) or () for a in arguments if isinstance(a, fx.Node)))
        if tuple(small) != shape(node):
            _shrink(node, small)
    remove_dead(graph)


def _unexpanded(argument: Any) -> Any:
    return first(argument) if calls(argument, {A.expand.default}) else argument


def _shrink(node: fx.Node, sizes: torch.Size) -> None:
    """Say that `node` now has these sizes, and expand it for its users."""
    with node.graph.inserting_after(node):
        expanded = like(node.graph.call_function(A.expand.default, (node, list(shape(node) or ()))), node)
    node.replace_all_uses_with(expanded, delete_user_cb=lambda user: user is not expanded)
    like(node, node, sizes)
