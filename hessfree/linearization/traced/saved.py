"""What autograd saved while the network ran: the residuals of its linear maps, without a second forward pass.

A node of the autograd graph is an operator with what its derivative needs, as attributes named `_saved_...`. Two
graphs of the same operators, edges and plain attributes are the same function of their saved tensors. So a trace,
which knows each saved tensor by its place in the graph, can take them from any later graph of the same structure.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

# those that torch generates from a table, with everything they save as an attribute; custom functions (and in-place
# operations on views) keep what they need where it cannot be seen
GENERATED = re.compile(r"\w+Backward\d+")
PREFIX = "_saved_"
# tracing writes one operator for another of the same derivative
RENAMED = {"ReshapeAliasBackward0": "ViewBackward0", "UnsafeViewBackward0": "ViewBackward0"}


@dataclasses.dataclass(frozen=True, eq=False)
class SavedState:
    """What the nodes behind some tensors saved.

    Attributes:
        structure: The nodes, their edges and what they saved beside tensors; compare with ==.
        tensors: The saved tensors, some with a graph, in the order of the walk.
    """

    structure: tuple[Any, ...]
    tensors: tuple[Tensor, ...]


def read_saved(starts: Sequence[tuple[Node | None, int]], leaves: Mapping[int, int]) -> SavedState | None:
    """Walk an autograd graph and take down what its nodes saved.

    Args:
        starts: Where to begin: nodes, and the numbers of their outputs.
        leaves: Number of each leaf tensor, by id.

    Returns:
        The state; None where a node hides what it saved, a saved tensor has been written into or freed since, or the
        graph leads to other leaves.
    """
    order = _walk([node for node, _ in starts])
    if order is None:
        return None
    numbers: dict[Node | None, int] = {node: i for i, node in enumerate(order)}
    structure: list[Any] = [(numbers[node], i) for node, i in starts]
    tensors: list[Tensor] = []
    for node in order:
        edges = tuple((numbers.get(n), i) for n, i in node.next_functions)
        attributes: list[Any] = []
        if type(node).__name__ == "AccumulateGrad":
            attributes.append(leaves.get(id(node.variable)))  # type: ignore[attr-defined]
            if attributes[0] is None:
                return None
        try:
            for field in _fields(type(node)):
                if not _take(getattr(node, field), attributes, tensors):
                    return None
            made = tuple((tuple(m.shape), m.dtype) for m in node._input_metadata)
        except (AttributeError, RuntimeError):  # written into, freed, or a node of another kind
            return None
        name = type(node).__name__
        structure.append((RENAMED.get(name, name), edges, made, tuple(attributes)))
    return SavedState(tuple(structure), tuple(tensors))


def _walk(nodes: Sequence[Node | None]) -> list[Node] | None:
    waiting = list(reversed(nodes))
    found: dict[Node, None] = {}
    while waiting:
        node = waiting.pop()
        if node is None or not (type(node).__name__ == "AccumulateGrad" or GENERATED.fullmatch(type(node).__name__)):
            return None
        if node not in found:
            found[node] = None
            waiting.extend(n for n, _ in node.next_functions if n is not None)
    return list(found)


@functools.lru_cache(maxsize=1024)
def _fields(kind: type) -> tuple[str, ...]:
    return tuple(name for name in dir(kind) if name.startswith(PREFIX))


def _take(value: Any, attributes: list[Any], tensors: list[Tensor]) -> bool:
    """Put `value` where it belongs; tell whether it is of a kind that can be compared."""
    if isinstance(value, Tensor):
        if type(value) not in {Tensor, nn.Parameter} or value.layout != torch.strided:
            return False
        attributes.append(Tensor)
        tensors.append(value)
        return True
    if isinstance(value, tuple | list):
        attributes.append(len(value))
        return all(_take(v, attributes, tensors) for v in value)
    attributes.append(value)
    return True
