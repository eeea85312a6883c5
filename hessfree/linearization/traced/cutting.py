"""Cut a joint graph into what runs once at every new θ and what runs at every product."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Sequence

from torch import fx
from torch.utils._pytree import tree_leaves

from hessfree.linearization.base import LinearizationError
from hessfree.linearization.traced.nodes import A, dependents, dtype, is_random, is_view, like, remove_dead, shape


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
    """

    primal: fx.Graph
    jvp: LinearPart
    vjp: LinearPart


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


def cut(graph: fx.Graph, state: range) -> Parts:
    """Cut `graph` by dependence on v and on u.

    Args:
        graph: A clean joint graph; its last two placeholders are v and u, its last two results J v and Jᵀ u.
        state: Which placeholders are the module's buffers: what is kept of them for the products is copied, since
            they go on to change.

    Returns:
        The parts.

    Raises:
        LinearizationError: The graph is no pair of linear maps.
    """
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    v, u = placeholders[-2:]
    on_v, on_u = dependents(graph, [v]), dependents(graph, [u])
    (output,) = (n for n in graph.nodes if n.op == "output")
    *z, jv, jtu = tree_leaves(output.args[0])
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
    changing = {placeholders[i] for i in state}
    residuals = tuple(_kept(primal, n, copies[n], changing) for n in kept)
    primal.output((tuple(copies[n] for n in z), residuals))
    return Parts(primal, jvp, vjp)


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
    return LinearPart(graph, tuple(kept.setdefault(n, len(kept)) for n in needed))


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


def _kept(primal: fx.Graph, node: fx.Node, copy: fx.Node, changing: set[fx.Node]) -> fx.Node:
    base = node
    while (is_view(base) or base.target in {A.reshape.default, operator.getitem}) and base.all_input_nodes:
        base = base.all_input_nodes[0]
    if base not in changing:
        return copy
    return like(primal.call_function(A.clone.default, (copy,)), node)
