"""Take out of a functional graph what tracing put in: aliases, copies, transposes of transposes, duplicates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from hessfree.linearization.traced.nodes import RESHAPES, A, dtype, is_random, like, remove_dead, replace, shape

ALIASES = {A.alias.default, A.detach.default}
INVERSE_OF_ITSELF = {A.t.default, A.neg.default}
# operators that update running statistics behind the back of their schema; in train mode these do not
# enter their results
BATCH_NORMS = {A.native_batch_norm.default: 3, A.cudnn_batch_norm.default: 3, A.miopen_batch_norm.default: 3}
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
            replace(node, node.args[0])
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
    place = BATCH_NORMS[node.target]
    if node.args[place + 2] is True:
        node.args = (*node.args[:place], None, None, *node.args[place + 2 :])


def _remove_copies(graph: fx.Graph) -> None:
    for node in list(graph.nodes):
        if node.target is A.clone.default and not node.kwargs:
            replace(node, node.args[0])
        elif node.target is A.copy.default:
            target, source = node.args[:2]
            if shape(target) == shape(source) and dtype(target) == dtype(source):
                replace(node, source)
    remove_dead(graph)


def _cancel(graph: fx.Graph) -> None:
    for node in list(graph.nodes):
        if node.target in RESHAPES:
            node.target = A.reshape.default  # what was a view of a copy may now be a view of something else
            argument = node.args[0]
            if argument.target is A.reshape.default:
                node.args = (argument.args[0], node.args[1])
            if shape(node.args[0]) == shape(node):
                replace(node, node.args[0])
            else:
                node.args = (node.args[0], list(shape(node) or ()))
        elif node.target in INVERSE_OF_ITSELF:
            argument = node.args[0]
            if isinstance(argument, fx.Node) and argument.target is node.target:
                replace(node, argument.args[0])
        elif node.target is A.transpose.int:
            _cancel_transpose(node)
        elif node.target in {A.expand.default, A.slice.Tensor} and shape(node.args[0]) == shape(node):
            replace(node, node.args[0])
    remove_dead(graph)


def _cancel_transpose(node: fx.Node) -> None:
    argument = node.args[0]
    if argument.target is A.transpose.int and _axes(argument) == _axes(node):
        replace(node, argument.args[0])


def _axes(node: fx.Node) -> set[int]:
    rank = len(shape(node) or ())
    return {axis % rank for axis in node.args[1:3]}


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
            _with_meta_after(node, lambda n: (A.expand.default, (n, list(shape(n) or ()))), small)
    remove_dead(graph)


def _unexpanded(argument: Any) -> Any:
    if isinstance(argument, fx.Node) and argument.target is A.expand.default:
        return argument.args[0]
    return argument


def _with_meta_after(node: fx.Node, call: Callable[[fx.Node], Any], sizes: torch.Size) -> None:
    target, arguments = call(node)
    with node.graph.inserting_after(node):
        after = like(node.graph.call_function(target, arguments), node)
    node.replace_all_uses_with(after, delete_user_cb=lambda user: user is not after)
    like(node, node, sizes)
