"""The residuals of a trace as functions of what autograd saves: the graph that takes the place of a second forward."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from hessfree.linearization.traced.bindings import bind_directly
from hessfree.linearization.traced.cleaning import STRIDED
from hessfree.linearization.traced.cutting import Parts
from hessfree.linearization.traced.nodes import A, first, is_random, like, shape
from hessfree.linearization.traced.saved import SavedState

# what autograd saved may be a view of what a linear map needs, and these can be undone
INVERTIBLE = {A.t.default, A.transpose.int, A.permute.default, A.reshape.default}


class Slots:
    """Computes residuals from saved tensors.

    The graph holds neither parameters nor inputs nor random draws: nothing but formulas of derivatives. So it is as
    right as autograd itself, whatever the code of the network did this time, if the structure is the same.
    """

    def __init__(
        self,
        structure: tuple[Any, ...],
        constants: Mapping[int, Tensor],
        nodes: Sequence[fx.Node],
        kept: Sequence[fx.Node],
        changing: Collection[fx.Node],
    ) -> None:
        """Build the graph.

        Args:
            structure: Of the autograd graph.
            constants: Saved numbers that are literals of the network's code (of `2 * x` the 2), by place.
            nodes: The other saved tensors in a clean graph, in their order.
            kept: The residuals there.
            changing: Those of them that must be copied.

        Raises:
            NotComputable: Some residual is no function of saved tensors.
        """
        self._structure, self._constants = structure, constants
        builder = _Builder(nodes)
        results = [builder.node(k) for k in kept]
        self._same = builder.same()
        graph = builder.graph
        copied = [
            like(graph.call_function(A.clone.default, (r,)), k) if k in changing else r
            for k, r in zip(kept, results, strict=True)
        ]
        graph.output(tuple(copied))
        bind_directly(graph)
        self._used = builder.used
        self._forward = fx.GraphModule(nn.Module(), graph).forward

    @classmethod
    def of(cls, parts: Parts, structure: tuple[Any, ...], constants: Mapping[int, Tensor]) -> Slots | None:
        """Build the graph for the parts of a joint graph.

        Args:
            parts: The parts.
            structure: Of the autograd graph.
            constants: Saved numbers that are literals of the network's code, by place.

        Returns:
            The graph; None where some residual is no function of saved tensors.
        """
        if not parts.kept or any(node.target in STRIDED for node in parts.kept[0].graph.nodes):
            return None  # as_strided reads memory as it lies
        try:
            return cls(structure, constants, parts.saved, parts.kept, parts.changing)
        except NotComputable:
            return None

    def residuals(self, state: SavedState) -> tuple[Tensor, ...] | None:
        """Return the residuals.

        Args:
            state: What autograd saved in an evaluation of the network.

        Returns:
            The residuals, some of which are saved tensors themselves; None where the evaluation was of another
            structure.
        """
        if state.structure != self._structure:
            return None
        tensors = []
        for place, tensor in enumerate(state.tensors):
            constant = self._constants.get(place)
            if constant is None:
                tensors.append(tensor)
            elif tensor.dtype != constant.dtype or not torch.equal(tensor, constant):
                return None
        for group in self._same:
            if len({tensors[i].untyped_storage().data_ptr() for i in group}) > 1:
                return None
        with torch.no_grad():
            return self._forward(*(tensors[i].detach() for i in self._used))


class NotComputable(Exception):
    """A residual is no function of saved tensors."""


@dataclasses.dataclass(eq=False)
class _Builder:
    nodes: Sequence[fx.Node]
    graph: fx.Graph = dataclasses.field(default_factory=fx.Graph)
    used: list[int] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        self._places: dict[fx.Node, list[int]] = {}
        self._views: dict[fx.Node, fx.Node] = {}  # a base, and a saved view of it
        self._behind: dict[fx.Node, list[int]] = {}
        for i, node in enumerate(self.nodes):
            self._places.setdefault(node, []).append(i)
        for i, node in enumerate(self.nodes):
            while node.target in INVERTIBLE:
                self._views.setdefault(first(node), node)
                node = first(node)
                self._behind.setdefault(node, []).append(i)
        self._copies: dict[fx.Node, fx.Node] = {}
        self._needed: list[fx.Node] = []

    def node(self, wanted: fx.Node) -> fx.Node:
        """Return the copy of a node, with what it is computed from before it."""
        waiting = [wanted]
        while waiting:
            node = waiting[-1]
            missing = [n for n in self._sources(node) if n not in self._copies]
            if node in self._copies or not missing:
                waiting.pop()
                if node not in self._copies:
                    self._copies[node] = self._copy(node)
            elif len(waiting) > len(node.graph.nodes):
                raise NotComputable("a view is undone in a circle")
            else:
                waiting += missing
        return self._copies[wanted]

    def same(self) -> list[list[int]]:
        """Return the saved tensors that must be one memory, for the trace uses one in the place of the others."""
        groups = [self._places.get(node) or self._behind[node] for node in self._needed]
        return [group for group in groups if len(group) > 1]

    def _sources(self, node: fx.Node) -> list[fx.Node]:
        if node in self._places:
            return []
        return [self._views[node]] if node in self._views else node.all_input_nodes

    def _copy(self, node: fx.Node) -> fx.Node:
        if node in self._places:
            self.used.append(self._places[node][0])
            self._needed.append(node)
            return like(self.graph.placeholder(f"s{self.used[-1]}"), node)
        if node in self._views:
            self._needed.append(node)
            return self._undone(node, self._views[node])
        if node.op != "call_function" or is_random(node):
            raise NotComputable(f"{node.name} is not computed from saved tensors")
        return self.graph.node_copy(node, self._copies.__getitem__)

    def _undone(self, base: fx.Node, view: fx.Node) -> fx.Node:
        target: Any = view.target
        arguments: tuple[Any, ...] = tuple(view.args[1:])
        if view.target is A.reshape.default:
            arguments = (list(shape(base) or ()),)
        elif view.target is A.permute.default:
            axes = [axis % len(arguments[0]) for axis in arguments[0]]
            arguments = ([axes.index(i) for i in range(len(axes))],)
        return like(self.graph.call_function(target, (self._copies[view], *arguments)), base)
