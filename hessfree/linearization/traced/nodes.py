"""What the passes over a traced graph need to know of its nodes."""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import Any, TypeGuard

import torch
from torch import fx

A = torch.ops.aten

# view operations that a graph may hold under several names; all are exact reshapes in a functional graph
RESHAPES = {A.view.default, A._unsafe_view.default, A.reshape.default, A._reshape_alias.default}


def describe(graph: fx.Graph) -> None:
    """Keep of what tracing wrote about each node only shape, dtype and device (None for several tensors)."""
    for node in graph.nodes:
        value = node.meta.get("val")
        known = isinstance(value, torch.Tensor)
        node.meta = {
            "shape": tuple(value.shape) if known else None,
            "dtype": value.dtype if known else None,
            "device": value.device if known else None,
        }


def shape(node: fx.Node) -> tuple[int, ...] | None:
    """Return the shape of what `node` computes; None where that is not one tensor."""
    return node.meta.get("shape")


def dtype(node: fx.Node) -> torch.dtype:
    """Return the dtype of what `node` computes."""
    return node.meta["dtype"]


def numel(node: fx.Node) -> int:
    """Return the number of elements of what `node` computes."""
    sizes = shape(node)
    assert sizes is not None
    return torch.Size(sizes).numel()


def first(node: fx.Node) -> fx.Node:
    """Return the first argument of `node`, which must be a node itself."""
    argument = node.args[0]
    assert isinstance(argument, fx.Node)
    return argument


def calls(value: Any, targets: Container[Any]) -> TypeGuard[fx.Node]:
    """Tell whether `value` is a node that calls one of `targets`."""
    return isinstance(value, fx.Node) and value.target in targets


def like(node: fx.Node, model: fx.Node, sizes: Iterable[int] | None = None) -> fx.Node:
    """Give `node` the dtype and device of `model`, and its shape unless `sizes` says otherwise."""
    node.meta = dict(model.meta)
    if sizes is not None:
        node.meta["shape"] = tuple(sizes)
    return node


def schema(node: fx.Node) -> Any:
    """Return the schema of the operator that `node` calls, or None."""
    return getattr(node.target, "_schema", None)


def is_random(node: fx.Node) -> bool:
    """Tell whether `node` draws random numbers."""
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def is_view(node: fx.Node) -> bool:
    """Tell whether `node` returns a view of its first argument."""
    found = schema(node)
    if found is None or not found.returns:
        return False
    alias = found.returns[0].alias_info
    return alias is not None and not alias.is_write


def mutates(node: fx.Node) -> bool:
    """Tell whether `node` writes into one of its arguments."""
    found = schema(node)
    return found is not None and found.is_mutable


def dependents(graph: fx.Graph, roots: Iterable[fx.Node]) -> set[fx.Node]:
    """Return `roots` and every node computed from them."""
    found = set(roots)
    for node in graph.nodes:
        if any(argument in found for argument in node.all_input_nodes):
            found.add(node)
    return found


def remove_dead(graph: fx.Graph) -> None:
    """Erase what nothing uses, but never a random draw: those after it would come out differently."""
    for node in reversed(list(graph.nodes)):
        if not node.users and node.op in {"call_function", "get_attr"} and not is_random(node):
            graph.erase_node(node)


def replace(node: fx.Node, other: fx.Node) -> None:
    """Use `other` wherever `node` was used, and erase `node`."""
    node.replace_all_uses_with(other)
    node.graph.erase_node(node)
