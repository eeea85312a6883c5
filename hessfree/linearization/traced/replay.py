"""Run a linear part into buffers that are allocated once: nothing but kernels, where tensors are small."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from hessfree.linearization.traced.nodes import RESHAPES, A

# operators with a kernel that writes straight into `out`, by the function that calls it with least overhead
INTO: dict[Any, Callable[..., Tensor]] = {
    A.mm.default: torch.mm,
    A.addmm.default: torch.addmm,
    A.bmm.default: torch.bmm,
    A.baddbmm.default: torch.baddbmm,
    A.mul.Tensor: torch.mul,
    A.mul.Scalar: torch.mul,
    A.add.Tensor: torch.add,
    A.add.Scalar: torch.add,
    A.sub.Tensor: torch.sub,
    A.sub.Scalar: torch.sub,
    A.div.Tensor: torch.div,
    A.div.Scalar: torch.div,
    A.neg.default: torch.neg,
    A.sum.dim_IntList: torch.sum,
    A.mean.dim: torch.mean,
}
# those of them that may write over an argument: each entry of the result needs that entry alone, and of
# a b + c only c
OVERWRITES = {A.mul.Tensor, A.mul.Scalar, A.add.Tensor, A.add.Scalar, A.sub.Tensor, A.sub.Scalar, A.div.Tensor}
OVERWRITES |= {A.div.Scalar, A.neg.default, A.addmm.default, A.baddbmm.default}
ACCUMULATES = {A.addmm.default, A.baddbmm.default}
COPIES = {A.clone.default, A._to_copy.default, *RESHAPES}


class Replay:
    """Statements over fixed buffers that compute a linear part.

    Attributes:
        input: Write the tangent here,
        output: call `run(*residuals)`, and read the result here before anything runs again.
        run: The statements.
    """

    def __init__(self, graph: fx.Graph, tangent: Tensor, residuals: Sequence[Tensor]) -> None:
        """Compile `graph`.

        Args:
            graph: Operators from (tangent, residuals) to one flat vector.
            tangent: An example.
            residuals: An example; later ones have the same shapes, dtypes and strides.
        """
        with torch.no_grad():
            writer = _Writer(graph, tangent, residuals)
            for index in range(len(writer.nodes)):
                writer.write(index)
            self.input, self.output = writer.input, writer.result
            self.run = writer.function()


@dataclasses.dataclass(eq=False)
class _Memory:
    """The memory of one node and all its views."""

    owner: fx.Node
    last: int = -1


class _Writer:
    def __init__(self, graph: fx.Graph, tangent: Tensor, residuals: Sequence[Tensor]) -> None:
        self.input = torch.empty_like(tangent)
        placeholders = [n for n in graph.nodes if n.op == "placeholder"]
        self.nodes = [n for n in graph.nodes if n.op == "call_function"]
        (output,) = (n for n in graph.nodes if n.op == "output")
        self.values: dict[fx.Node, Any] = dict(zip(placeholders, [tangent, *residuals], strict=True))
        self.memory: dict[fx.Node, _Memory] = {n: _Memory(n, len(self.nodes)) for n in placeholders}
        self._watch(output.args[0])
        self.names = {n: f"r{i}" for i, n in enumerate(placeholders[1:])}
        self._parameters = ", ".join(self.names.values())
        self.fixed: dict[fx.Node, Any] = {placeholders[0]: self.input}  # values that are the same at every run
        self._namespace: dict[str, Any] = {}
        self._lines: list[str] = []
        self._numbers = itertools.count()
        self._free: dict[tuple[torch.dtype, int], list[Tensor]] = {}
        self._lay_out(output.args[0])

    # --- what happens in one run, seen with the examples ---

    def _watch(self, result: fx.Node) -> None:
        """Compute every node once, and find out which share memory and when each is used last."""
        for i, node in enumerate(self.nodes):
            args, kwargs = fx.map_arg((node.args, node.kwargs), self.values.__getitem__)
            value = self.values[node] = node.target(*args, **kwargs)
            storages = {_storage(t) for t in tree_leaves(value) if isinstance(t, Tensor)}
            shared = [
                a
                for a in node.all_input_nodes
                if any(_storage(t) in storages for t in tree_leaves(self.values[a]) if isinstance(t, Tensor))
            ]
            self.memory[node] = self.memory[shared[0]] if shared else _Memory(node)
            for used in (node, *node.all_input_nodes):
                self.memory[used].last = max(self.memory[used].last, i)
        self.memory[result].last = len(self.nodes)

    def _lay_out(self, result: fx.Node) -> None:
        """Let the nodes that are joined into the result write straight into their parts of it."""
        joined = result.target is A.cat.default
        self._pieces: list[fx.Node] = list(result.args[0]) if joined else [result]  # type: ignore[arg-type]
        self.result = torch.empty_like(self.values[result])
        self._result_node = result if joined else None
        self._places: dict[fx.Node, Tensor] = {}
        for piece, place in zip(self._pieces, self._parts(), strict=True):
            owner = self.memory[piece].owner
            value = self.values[owner]
            whole = owner.target in INTO and value.is_contiguous() and _same_memory(value, self.values[piece])
            if whole and owner not in self._places:
                self._places[owner] = place.view(value.shape)
                self.memory[owner].last = len(self.nodes)

    def _parts(self) -> Sequence[Tensor]:
        return self.result.split([self.values[p].numel() for p in self._pieces])

    # --- writing ---

    def write(self, index: int) -> None:
        node = self.nodes[index]
        if node is self._result_node:
            return
        value, arguments = self.values[node], node.all_input_nodes
        if self.memory[node].owner is not node:
            self._write_view(node)
        elif isinstance(value, Tensor) and (node.target in INTO or node.target in COPIES):
            self._write_into(node, index)
        else:
            self._call(node)
        self._release([node, *arguments], index)

    def function(self) -> Callable[..., None]:
        """Return the statements as a function of the residuals."""
        for piece, place in zip(self._pieces, self._parts(), strict=True):
            owner = self.memory[piece].owner
            if owner not in self._places or not _same_memory(self.fixed[piece], place):
                self._lines.append(f"{self._constant(place)}.copy_({self._text(piece)}.reshape(-1))")
        body = "\n    ".join(self._lines or ["pass"])
        exec(f"def run({self._parameters}):\n    {body}", self._namespace)  # noqa: S102
        return self._namespace["run"]

    def _write_view(self, node: fx.Node) -> None:
        if all(a in self.fixed for a in node.all_input_nodes):
            args, kwargs = fx.map_arg((node.args, node.kwargs), self.fixed.__getitem__)
            self.fixed[node] = node.target(*args, **kwargs)
        else:
            self._call(node)

    def _call(self, node: fx.Node) -> None:
        self.names[node] = f"n{next(self._numbers)}"
        text = ", ".join([self._text(a) for a in node.args] + [f"{k}={self._text(a)}" for k, a in node.kwargs.items()])
        self._lines.append(f"{self.names[node]} = {self._constant(node.target)}({text})")

    def _write_into(self, node: fx.Node, index: int) -> None:
        self.fixed[node] = buffer = self._buffer(node, index)
        if node.target in COPIES:
            source = node.args[0]
            assert isinstance(source, fx.Node)
            shaped = buffer if node.target not in RESHAPES else buffer.view(self.values[source].shape)
            self._lines.append(f"{self._constant(shaped)}.copy_({self._text(source)})")
            return
        parts = [self._text(a) for a in node.args] + [f"{k}={self._text(a)}" for k, a in node.kwargs.items()]
        self._lines.append(f"{self._constant(INTO[node.target])}({', '.join(parts)}, out={self._text(node)})")

    def _buffer(self, node: fx.Node, index: int) -> Tensor:
        """Return where `node` writes: its part of the result, a dying argument, or free memory."""
        if node in self._places:
            return self._places[node]
        value = self.values[node]
        if node.target in OVERWRITES:
            for argument in node.args[: 1 if node.target in ACCUMULATES else 2]:
                if isinstance(argument, fx.Node) and self._may_overwrite(argument, value, index):
                    self.memory[node] = self.memory[argument]
                    return self.fixed[argument]
        free = self._free.get((value.dtype, value.numel()))
        flat = free.pop() if free else torch.empty(value.numel(), dtype=value.dtype, device=value.device)
        return flat.as_strided(value.shape, value.stride())

    def _may_overwrite(self, argument: fx.Node, value: Tensor, index: int) -> bool:
        memory, found = self.memory[argument], self.fixed.get(argument)
        return (
            memory.last == index
            and memory.owner.op == "call_function"
            and isinstance(found, Tensor)
            and (found.shape, found.stride(), found.dtype) == (value.shape, value.stride(), value.dtype)
        )

    def _release(self, nodes: Sequence[fx.Node], index: int) -> None:
        raise NotImplementedError
