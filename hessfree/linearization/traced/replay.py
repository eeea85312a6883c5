"""Run a linear part into buffers that are allocated once: nothing but kernels, where tensors are small."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from hessfree.linearization.traced.bindings import INTO
from hessfree.linearization.traced.nodes import RESHAPES, A, first

# how many of their first arguments these may write over: of a b + c only c, of a pointwise operation any
OVERWRITES: dict[Any, int] = {A.mul.Tensor: 2, A.add.Tensor: 2, A.sub.Tensor: 2, A.div.Tensor: 2}
OVERWRITES |= dict.fromkeys([A.mul.Scalar, A.add.Scalar, A.sub.Scalar, A.div.Scalar, A.neg.default], 1)
OVERWRITES |= dict.fromkeys([A.threshold_backward.default, A.addmm.default, A.baddbmm.default], 1)
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
    """The memory of one node and of all its views."""

    owner: fx.Node
    last: int = -1  # index of the node that uses it last
    flat: Tensor | None = None  # a fixed buffer that may be used again after that
    names: list[str] = dataclasses.field(default_factory=list)  # variables that hold it, where it is not fixed


class _Watch:
    """One run with the examples: every value, which nodes share memory, and when each is used last."""

    def __init__(self, graph: fx.Graph, examples: Sequence[Tensor]) -> None:
        placeholders = [n for n in graph.nodes if n.op == "placeholder"]
        self.nodes = [n for n in graph.nodes if n.op == "call_function"]
        self.values: dict[fx.Node, Any] = dict(zip(placeholders, examples, strict=True))
        self.memory = {n: _Memory(n, len(self.nodes)) for n in placeholders}
        for i, node in enumerate(self.nodes):
            args, kwargs = fx.map_arg((node.args, node.kwargs), self.values.__getitem__)
            self.values[node] = node.target(*args, **kwargs)
            self.memory[node] = self._shared(node) or _Memory(node)
            if node.target is A.cat.default and all(user.op == "output" for user in node.users):
                continue  # joins the pieces of the result, each of which is copied as soon as it is there
            for used in (node, *node.all_input_nodes):
                self.memory[used].last = max(self.memory[used].last, i)

    def _shared(self, node: fx.Node) -> _Memory | None:
        storages = _storages(self.values[node])
        if node.target is operator.getitem and self._stands_alone(node, storages):
            return None  # or the first result of an operator would live as long as its last
        return next((self.memory[a] for a in node.all_input_nodes if storages & _storages(self.values[a])), None)

    def _stands_alone(self, node: fx.Node, storages: set[int]) -> bool:
        """Tell whether one of several results of an operator is new memory, which no other of them uses."""
        source = first(node)
        others = [t for i, t in enumerate(self.values[source]) if i != node.args[1]]
        return self.memory[source].owner is source and not storages & _storages(others)


class _Writer:
    """Writes one statement a kernel, and plans the buffers."""

    def __init__(self, graph: fx.Graph, tangent: Tensor, residuals: Sequence[Tensor]) -> None:
        watch = _Watch(graph, [tangent, *residuals])
        self.nodes, self.values, self.memory = watch.nodes, watch.values, watch.memory
        first, *rest = (n for n in graph.nodes if n.op == "placeholder")
        (output,) = (n for n in graph.nodes if n.op == "output")
        self.input = torch.empty_like(tangent)
        self.fixed: dict[fx.Node, Any] = {first: self.input}  # values that are the same tensors at every run
        self._names = {n: f"r{i}" for i, n in enumerate(rest)}
        self._header = f"def run({', '.join(self._names.values())}):"
        self._lines: list[str] = []
        self._namespace: dict[str, Any] = {}
        self._free: dict[tuple[torch.dtype, int], list[Tensor]] = {}
        self._lay_out(output.args[0])

    def _lay_out(self, result: fx.Node) -> None:
        """Let the nodes that are joined into the result write straight into their parts of it."""
        joined = result.target is A.cat.default
        pieces: Any = result.args[0] if joined else [result]
        self._joining = result if joined else None
        self.result = torch.empty_like(self.values[result])
        parts = self.result.split([self.values[p].numel() for p in pieces])
        self._pieces = list(zip(pieces, parts, strict=True))
        self._places: dict[fx.Node, Tensor] = {}
        for piece, part in self._pieces:
            memory = self.memory[piece]
            value = self.values[memory.owner]
            if memory.owner.target in INTO and _same(value, self.values[piece]) and memory.owner not in self._places:
                self._places[memory.owner] = part.view(value.shape)
                memory.last = len(self.nodes)

    def write(self, index: int) -> None:
        """Write the statement of one node."""
        node = self.nodes[index]
        if node is self._joining:
            return
        memory = self.memory[node]
        if memory.owner is not node and all(a in self.fixed for a in node.all_input_nodes):
            args, kwargs = fx.map_arg((node.args, node.kwargs), self.fixed.__getitem__)
            self.fixed[node] = node.target(*args, **kwargs)  # a view, made once
        elif memory.owner is node and node.target in INTO:
            if not self._overwrite(node, index):
                self.fixed[node] = self._buffer(node)
            out = f", out={self._text(node)}"
            self._lines.append(f"{self._constant(INTO[node.target])}({self._arguments(node)}{out})")
        elif memory.owner is node and node.target in COPIES:
            self.fixed[node] = buffer = self._buffer(node)
            source = first(node)
            shaped = buffer.view(self.values[source].shape) if node.target in RESHAPES else buffer
            self._lines.append(f"{self._constant(shaped)}.copy_({self._text(source)})")
        else:
            self._names[node] = name = f"n{index}"
            memory.names.append(name)
            self._lines.append(f"{name} = {self._constant(node.target)}({self._arguments(node)})")
        self._copy_pieces(node)  # at once, so that a gradient does not wait for those of all other layers
        for used in {id(m): m for m in (memory, *(self.memory[a] for a in node.all_input_nodes))}.values():
            if used.last == index:
                self._release(used)

    def function(self) -> Callable[..., None]:
        """Return the statements as a function of the residuals."""
        for piece in {p for p, _ in self._pieces if p.op == "placeholder"}:
            self._copy_pieces(piece)
        exec("\n    ".join([self._header, *self._lines, "return"]), self._namespace)
        return self._namespace["run"]

    def _copy_pieces(self, node: fx.Node) -> None:
        for piece, part in self._pieces:
            written = self.memory[piece].owner in self._places
            if piece is node and not (written and _same(self.fixed[piece], part)):
                self._lines.append(f"{self._constant(part)}.copy_({self._text(piece)}.reshape(-1))")

    def _overwrite(self, node: fx.Node, index: int) -> bool:
        """Let `node` write over an argument that is not needed again, if there is one."""
        if node in self._places:
            return False
        value, memory = self.values[node], self.memory[node]
        for argument in node.args[: OVERWRITES.get(node.target, 0)]:
            if not isinstance(argument, fx.Node) or not _same_layout(self.values[argument], value):
                continue
            old = self.memory[argument]
            # another view of the same memory among the arguments would be read after it was overwritten
            read_later = old.last != index or any(
                self.memory[a] is old and a is not argument for a in node.all_input_nodes
            )
            if read_later or (old.flat is None and not old.names):
                continue
            if argument in self.fixed:
                self.fixed[node] = self.fixed[argument]
            else:
                self._names[node] = self._names[argument]
            memory.flat, memory.names, old.flat, old.names = old.flat, old.names, None, []
            return True
        return False

    def _buffer(self, node: fx.Node) -> Tensor:
        """Return where `node` writes: its part of the result, or free memory."""
        if node in self._places:
            return self._places[node]
        value, memory = self.values[node], self.memory[node]
        if not _dense(value):  # memory that nothing else can use
            return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
        free = self._free.get((value.dtype, value.numel()))
        memory.flat = free.pop() if free else torch.empty(value.numel(), dtype=value.dtype, device=value.device)
        return memory.flat.as_strided(value.shape, value.stride())

    def _release(self, memory: _Memory) -> None:
        if memory.flat is not None:
            self._free.setdefault((memory.flat.dtype, memory.flat.numel()), []).append(memory.flat)
            memory.flat = None
        elif memory.names:
            self._lines.append(f"del {', '.join(memory.names)}")

    def _arguments(self, node: fx.Node) -> str:
        return ", ".join([*map(self._text, node.args), *(f"{k}={self._text(a)}" for k, a in node.kwargs.items())])

    def _text(self, value: Any) -> str:
        if isinstance(value, fx.Node):
            return self._constant(self.fixed[value]) if value in self.fixed else self._names[value]
        if isinstance(value, tuple | list):
            return f"[{', '.join(map(self._text, value))}]"
        return repr(value) if value is None or isinstance(value, bool | int) else self._constant(value)

    def _constant(self, value: Any) -> str:
        name = f"c{id(value)}"
        self._namespace[name] = value  # held here, so that the id stays its own
        return name


def _storages(value: Any) -> set[int]:
    return {t.untyped_storage()._cdata for t in tree_leaves(value) if isinstance(t, Tensor)}


def _dense(tensor: Tensor) -> bool:
    """Tell whether no two entries share memory and there is none between them."""
    return torch.empty_like(tensor).stride() == tensor.stride()


def _same_layout(a: Tensor, b: Tensor) -> bool:
    return (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype) and _dense(a)


def _same(a: Tensor, b: Tensor) -> bool:
    """Tell whether two contiguous tensors are the same memory, shapes apart."""
    contiguous = a.is_contiguous() and b.is_contiguous()
    return contiguous and a.data_ptr() == b.data_ptr() and a.numel() == b.numel()
