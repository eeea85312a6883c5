"""Cut a joint graph into what runs once at every new θ and what runs at every product."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Sequence

from torch import fx
from torch.utils._pytree import tree_leaves

from hessfree.linearization.base import LinearizationError
from hessfree.linearization.traced.nodes import (
    A,
    dependents,
    dtype,
    first,
    is_random,
    is_view,
    like,
    remove_dead,
    shape,
)


@dataclasses.dataclass(frozen=True, eq=False)
class LinearPart:
    """One of the linear maps: takes the tangent and its residuals, returns one flat vector.

    Attributes:
        graph: Its operators; the first placeholder is the tangent.
        residuals: Which residuals the other placeholders take.
    """

    graph: fx.Graph
    residuals: tuple[int, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Parts:
    """A joint graph in three.

    Attributes:
        primal: (parameters, state, inputs) -> (z, residuals), two tuples.
        jvp: (v, residuals) -> J v.
        vjp: (u, residuals) -> Jᵀ u.
        kept: The residuals in the joint graph.
        changing: Those of them that go on to change.
        saved: What autograd saved, in the joint graph.
    """

    primal: fx.Graph
    jvp: LinearPart
    vjp: LinearPart
    kept: tuple[fx.Node, ...]
    changing: frozenset[fx.Node]
    saved: tuple[fx.Node, ...]


def separate(graph: fx.Graph) -> None:
    """Make J v independent of u also where an operator hides it.

    J v is the derivative of a linear map of u, and may use what an operator computed on the side while it was
    given u (the factors of a matrix, of `linalg.solve`): such operators are called once more, with u = 0.

    Args:
        graph: A described joint graph.
    """
    u = [n for n in graph.nodes if n.op == "placeholder"][-1]
    (output,) = (n for n in graph.nodes if n.op == "output")
    *others, jv, jtu = tree_leaves(output.args[0])
    hidden = dependents(graph, [u]) & _ancestors(jv)
    if not hidden:
        return
    options = {"dtype": dtype(u), "device": u.meta["device"]}
    with graph.inserting_after(u):
        zeros = like(graph.call_function(A.zeros.default, (list(shape(u) or ()),), options), u)
    copies = {u: zeros}
    for node in list(graph.nodes):
        if node in hidden and node is not u:
            with graph.inserting_before(node):
                copies[node] = graph.node_copy(node, lambda n: copies.get(n, n))
    output.args = ((*others, copies.get(jv, jv), jtu),)
    remove_dead(graph)


def cut(graph: fx.Graph, state: range, saved: int = 0) -> Parts:
    """Cut `graph` by dependence on v and on u.

    Args:
        graph: A clean joint graph; its last two placeholders are v and u, its last two results J v and Jᵀ u.
        state: Which placeholders are the module's buffers: what is kept of them for the products is copied, since
            they go on to change.
        saved: How many of the results before these two are not z, but what autograd saved.

    Returns:
        The parts.

    Raises:
        LinearizationError: The graph is no pair of linear maps.
    """
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    v, u = placeholders[-2:]
    on_v, on_u = dependents(graph, [v]), dependents(graph, [u])
    (output,) = (n for n in graph.nodes if n.op == "output")
    *others, jv, jtu = tree_leaves(output.args[0])
    z = others[: len(others) - saved]
    on_v, on_u = (on_v & _ancestors(jv)) | {v}, (on_u & _ancestors(jtu)) | {u}
    if on_v & on_u or any(n in on_v or n in on_u for n in z):
        raise LinearizationError("the products of the network cannot be told apart (is it linear in its cotangent?)")
    kept: dict[fx.Node, int] = {}
    jvp = _linear_part(v, jv, on_v, kept)
    vjp = _linear_part(u, jtu, on_u, kept)
    varying = dependents(graph, [v, u])
    primal = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in _in_order([n for n in graph.nodes if n not in varying and n.op != "output"], z):
        copies[node] = primal.node_copy(node, copies.__getitem__)
    buffers = {placeholders[i] for i in state}
    changing = frozenset(n for n in kept if _base(n) in buffers)
    residuals = tuple(
        like(primal.call_function(A.clone.default, (copies[n],)), n) if n in changing else copies[n] for n in kept
    )
    primal.output((tuple(copies[n] for n in z), residuals))
    remove_dead(primal)
    return Parts(primal, jvp, vjp, tuple(kept), changing, tuple(others[len(z) :]))


def _linear_part(tangent: fx.Node, result: fx.Node, varying: set[fx.Node], kept: dict[fx.Node, int]) -> LinearPart:
    graph = fx.Graph()
    copies = {tangent: graph.node_copy(tangent)}
    body = [n for n in tangent.graph.nodes if n in varying and n is not tangent]
    used = [a for n in body for a in n.all_input_nodes] + [result]
    needed = list(dict.fromkeys(n for n in used if n not in varying and n is not tangent))
    for node in needed:
        copies[node] = like(graph.placeholder(node.name), node)
    for node in body:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    mapped = copies[result]  # a result that does not vary (all zeros) must not be handed out as it is kept
    graph.output(mapped if result in varying else like(graph.call_function(A.clone.default, (mapped,)), result))
    _put_reshapes_first(graph)
    return LinearPart(graph, tuple(kept.setdefault(n, len(kept)) for n in needed))


def _put_reshapes_first(graph: fx.Graph) -> None:
    """Put each reshape right behind what it reshapes, so that a gradient of a layer is final as soon as it is known."""
    for node in list(graph.nodes):
        if node.target is A.reshape.default and first(node).op == "call_function":
            first(node).append(node)


def _ancestors(node: fx.Node) -> set[fx.Node]:
    found: set[fx.Node] = set()
    waiting: Sequence[fx.Node] = [node]
    while waiting:
        found.update(waiting)
        waiting = [a for n in waiting for a in n.all_input_nodes if a not in found]
    return found


def _in_order(nodes: Sequence[fx.Node], z: Sequence[fx.Node]) -> list[fx.Node]:
    """Return `nodes` such that what z does not need comes as soon as it can: a derivative frees what it is made of."""
    needed = set().union(*map(_ancestors, z))
    missing = {n: {a for a in n.all_input_nodes if a is not n} for n in nodes}
    ordered: list[fx.Node] = []

    def emit(node: fx.Node) -> None:
        waiting = [node]
        while waiting:
            done = waiting.pop()
            ordered.append(done)
            for user in done.users:
                if user in missing and done in missing[user]:
                    missing[user].discard(done)
                    if not missing[user] and user not in needed and not is_random(user):
                        waiting.append(user)

    for node in nodes:
        early = node not in needed and node.all_input_nodes and not is_random(node)
        if not early:  # in the order in which it was recorded, and with it all that can follow at once
            emit(node)
    return ordered


def _base(node: fx.Node) -> fx.Node:
    while (is_view(node) or node.target in {A.reshape.default, operator.getitem}) and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node
