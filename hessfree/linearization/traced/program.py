"""One linear part, ready to run: as the operators of its graph, replayed into fixed buffers, or compiled."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx, nn

from hessfree.linearization.selftest import close
from hessfree.linearization.traced.cleaning import STRIDED
from hessfree.linearization.traced.compiling import Function, compiled
from hessfree.linearization.traced.cutting import LinearPart
from hessfree.linearization.traced.nodes import A, is_view, shape
from hessfree.linearization.traced.replay import Replay

# bytes of intermediate results up to which a map keeps its buffers (a quarter of them or less, since buffers are used
# again): a fact about the graph and no clock, so that every process and every resumed run chooses alike
LARGEST_REPLAY = 2**27


class Program:
    """A linear map.

    Attributes:
        replays: Whether it runs in fixed buffers.
    """

    def __init__(self, part: LinearPart) -> None:
        """Take one part of a cut graph."""
        self._part = part
        self._forward = fx.GraphModule(nn.Module(), part.graph).forward
        self._compiled: Function | None = None
        self._replay: Replay | None = None
        self.replays = _bytes(part.graph) <= LARGEST_REPLAY
        # None until it was tried; as_strided takes each row for a storage of its own, and copy has no batching rule
        strided = any(n.target in STRIDED or n.target is A.copy.default for n in part.graph.nodes)
        self._vectorises: bool | None = False if strided else None

    def arguments(self, residuals: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return those of all `residuals` that this map needs."""
        return tuple(residuals[i] for i in self._part.residuals)

    def __call__(self, tangent: Tensor, arguments: tuple[Tensor, ...]) -> Tensor:
        """Apply the map to a flat vector; the result is the caller's own."""
        if self._compiled is not None:
            return self._compiled(tangent, *arguments)
        replay = self.replay(tangent, arguments)
        if replay is None:
            return self._forward(tangent, *arguments)
        replay.input.copy_(tangent)
        replay.run(*arguments)
        return replay.output.clone()

    def compiled(self, tangent: Tensor, arguments: tuple[Tensor, ...]) -> Function:
        """Return the map as torch.compile makes it, for `use`.

        Args:
            tangent: An example.
            arguments: An example of the residuals that the map needs.

        Returns:
            A function of the two.

        Raises:
            CompilationError: It cannot be compiled.
        """
        return compiled(self._forward, (tangent, *arguments))

    def use(self, function: Function) -> None:
        """Run `function`, which `compiled` returned, from now on."""
        self._compiled, self._replay, self.replays = function, None, False

    def replay(self, tangent: Tensor, arguments: tuple[Tensor, ...]) -> Replay | None:
        """Return the map in fixed buffers, compiled and checked at its first use with these examples.

        Args:
            tangent: A flat vector.
            arguments: The residuals that the map needs.

        Returns:
            The replay; None where the operators of the graph are to be called.
        """
        if self._replay is None and self.replays:
            try:
                self._replay = Replay(self._part.graph, tangent, arguments)
                self.replays = self._agrees(self._replay, tangent, arguments)
            except Exception:  # an operator without an `out` that was expected: the graph itself is as right
                self.replays = False
            if not self.replays:
                self._replay = None
        return self._replay

    def _agrees(self, replay: Replay, tangent: Tensor, arguments: tuple[Tensor, ...]) -> bool:
        replay.input.copy_(tangent)
        replay.run(*arguments)
        return close(replay.output, self._forward(tangent, *arguments))

    def rows(self, tangents: Tensor, arguments: tuple[Tensor, ...]) -> Tensor:
        """Apply the map to each row of `tangents` `[K, ...]`, at once where that gives the same."""
        if self._vectorises is not False:
            try:
                found = torch.func.vmap(lambda t: self._forward(t, *arguments))(tangents)
            except (RuntimeError, NotImplementedError, ValueError):
                self._vectorises = False
            else:
                # torch has batching rules that are wrong (_cdist_backward): compare the last row once
                if self._vectorises is None:
                    self._vectorises = close(found[-1], self._forward(tangents[-1], *arguments))
                if self._vectorises:
                    return found
        return torch.stack([self(t, arguments) for t in tangents])


def _bytes(graph: fx.Graph) -> int:
    total = 0
    for node in graph.nodes:
        sizes = shape(node)
        if node.op == "call_function" and sizes is not None and not is_view(node):
            total += torch.Size(sizes).numel() * node.meta["dtype"].itemsize
    return total
