"""The recorded network, to be evaluated once more: by a trace, or on the first few samples alone."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Generator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from hessfree.precision import unit
from hessfree.recording import (
    BufferStates,
    Call,
    CallTree,
    Output,
    Owners,
    RandomState,
    autocast_as,
    call_at,
    twice_differentiable,
)
from hessfree.vectors import ParameterVector


class Recorded(Protocol):
    """What is known of a run of the network.

    Attributes:
        roots: The outermost calls of modules that own parameters.
        buffers: The buffers of all modules called, as they were before.
    """

    roots: list[Call]
    buffers: BufferStates


@dataclasses.dataclass(frozen=True, eq=False)
class Network:
    """One evaluation of the network with its graph.

    Attributes:
        outputs: z of the evaluated samples.
        roots: The outermost recorded calls, for taps.
        calls: The calls that z came from; empty if z was marked.
    """

    outputs: tuple[Output, ...]
    roots: tuple[Call, ...]
    calls: tuple[Call, ...]


def arguments_of(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a call from a tensor, a tuple of positional or a dict of keyword arguments."""
    if isinstance(inputs, dict):
        return (), inputs
    return (inputs if isinstance(inputs, tuple) else (inputs,)), {}


def batch_size(outputs: Sequence[Output]) -> int:
    """Return N, the size of dimension 0 of every output; 0 where they share none."""
    counts = {o.shape[0] if o.shape else 0 for o in outputs}
    return counts.pop() if len(counts) == 1 else 0


def single_root(roots: Sequence[Call], calls: Sequence[Call]) -> tuple[Call | None, str]:
    """Return the one outermost call that all of z comes from, if its inputs do not depend on other computations.

    Args:
        roots: The outermost recorded calls.
        calls: The calls that z came from; empty if z was marked.

    Returns:
        The call, or None and the reason why there is none.
    """
    if not calls:
        return None, "mark_outputs marks tensors, and no module can be called again to compute them"
    numbers = {call.path[0] for call in calls}
    if len(numbers) > 1:
        return None, "the outputs come from several calls"
    root = roots[numbers.pop()]
    if any(isinstance(t, Tensor) and t.grad_fn is not None for t in tree_leaves((root.inputs, root.keywords))):
        name = type(root.module).__name__
        return None, f"the inputs of {name} depend on other computations that may hold parameters"
    return root, ""


def without_samples(root: Call, count: int) -> str:
    """Return why a call cannot be made on some of its samples alone, or an empty string.

    Args:
        root: The call.
        count: N, the number of samples that its outputs have along dimension 0.

    Returns:
        The reason: none of its arguments has as many along dimension 0.
    """
    inputs = [t for t in tree_leaves((root.inputs, root.keywords)) if isinstance(t, Tensor)]
    if any(t.ndim and t.shape[0] == count for t in inputs):
        return ""
    return (
        f"there are {count} samples along dimension 0 of the outputs, but the inputs of {type(root.module).__name__} "
        f"have shapes {[tuple(t.shape) for t in inputs]}"
    )


def same_numbers(new: Tensor, known: Tensor, largest: Tensor, tolerance: float | None = None) -> bool:
    """Tell whether two evaluations of the same samples gave the same.

    Args:
        new: Of a part of the batch perhaps, which may be multiplied in another order.
        known: As it was recorded.
        largest: The largest absolute number for all samples, of which rounding takes its measure.
        tolerance: How far they may differ, relative to `largest`; None for the square root of the precision.

    Returns:
        Whether they agree.
    """
    if new.shape != known.shape:
        return False
    if tolerance is None:
        tolerance = unit(known.dtype, known.device) ** 0.5
    return bool((new - known).abs().max() <= tolerance * largest)


class Evaluation:
    """The network on the whole batch, or on some of its rows; evaluated again only where that is needed.

    The network on a part of the batch must be the same network, and so must any other way to evaluate it: `agrees`
    compares outputs with the recorded ones.

    Attributes:
        rows: Which samples; None for the whole batch.
        samples: Samples seen; 0 where the outputs share no batch dimension.
        roots: The outermost recorded calls.
        outputs: The recorded z.
        calls: The calls that z came from; empty if z was marked.
        root: The outermost call that all of z comes from, if there is one and its inputs depend on nothing else.
        arguments: Its positional and keyword arguments, the tensors cut to the part; None for the whole batch.
        precise: Whether `network` is in the parameters' own precision: under no autocast.
    """

    def __init__(
        self,
        recorded: Recorded,
        outputs: Sequence[Output],
        calls: Sequence[Call],
        parameters: ParameterVector,
        rows: slice | None = None,
        owners: Owners | None = None,
        taps: Callable[[nn.Module], bool] = lambda _: False,
        precise: bool = True,
    ) -> None:
        """Describe the evaluation.

        Args:
            recorded: What was recorded of the run that z comes from.
            outputs: z.
            calls: The calls that z came from; empty if z was marked.
            parameters: The parameters.
            rows: Which samples (a start and a stop); None for all.
            owners: Modules to record in a second run; None for all that own parameters.
            taps: Those among them whose inputs to keep.
            precise: Whether to evaluate again, without autocast, what was called under it.
        """
        self.roots, self.outputs, self.calls = tuple(recorded.roots), tuple(outputs), tuple(calls)
        self.rows = rows
        self.samples = batch_size(outputs) if rows is None else rows.stop - rows.start
        self.root, _ = single_root(self.roots, self.calls)
        self.arguments: tuple[Any, Any] | None = None
        if self.root is not None and rows is not None:
            self.arguments = tree_map(self._part, (self.root.inputs, self.root.keywords))
        called = () if self.root is None else self.root.autocast
        self._autocast = () if precise else called
        self._again = rows is not None or called != self._autocast
        self.precise = not any(r.autocast for r in self.roots) or (self._again and not self._autocast)
        self._buffers, self._parameters = recorded.buffers, parameters
        self._owners, self._taps = owners, taps

    @functools.cached_property
    def network(self) -> Network | None:
        """The network with its graph; None where a part of the batch, or another evaluation, meets another network."""
        if not self._again:
            return Network(self.outputs, self.roots, self.calls)
        assert self.root is not None
        owners = Owners(self._parameters) if self._owners is None else self._owners
        tree = CallTree(owners, self._parameters.device, self._taps, lambda _: True)
        inputs, keywords = (self.root.inputs, self.root.keywords) if self.arguments is None else self.arguments
        plain = autocast_as(self._autocast, self._parameters.device)
        with self.world(), plain, torch.enable_grad(), twice_differentiable(), tree:
            self.root.module(*inputs, **keywords)
        again = tree.roots[0]
        if again.signature() != self.root.signature():
            return None
        places = {id(o): (call.path, i) for call in self.root.walk() for i, o in enumerate(call.outputs)}
        found = [(call_at([again], (0, *path[1:])), i) for path, i in (places[id(o)] for o in self.outputs)]
        outputs = tuple(call.outputs[i] for call, i in found)
        if not self.agrees([o.value for o in outputs]):
            return None
        return Network(outputs, (again,), tuple(dict.fromkeys(call for call, _ in found)))

    def agrees(self, values: Sequence[Tensor | None]) -> bool:
        """Tell whether `values`, one an output, are the recorded ones but for rounding.

        Args:
            values: From another evaluation of the same samples.

        Returns:
            Whether they agree, relative to the largest: to what the self-test asks of products; on a part of the
            batch, which may be multiplied in another order, or where autocast rounds, to the root of the precision.
        """
        rounded = [torch.finfo(dtype).eps for root in self.roots for _, dtype in root.autocast]
        for new, old in zip(values, self.outputs, strict=True):
            if new is None or old.value is None or not old.intact:
                return False
            known = old.value if self.rows is None else old.value[self.rows]
            precision = max(unit(old.dtype, known.device), *rounded, 0.0)
            tolerance = precision**0.5 if rounded or self.rows is not None else 8 * precision**0.75
            if not same_numbers(new, known, old.largest, tolerance):
                return False
        return True

    def batches(self) -> tuple[int, ...]:
        """Tell apart the outputs of calls that share no samples, micro-batches say.

        Returns:
            For each output the number of its batch, from 0; empty where there is one batch, or where that is not known
            of outermost calls: two are given the same tensor as long as the outputs, or one is given what was computed
            from something with a gradient, which may be another's output.
        """
        roots = {id(o): call.path[0] for call in self.calls for o in call.outputs}
        found = [roots[id(o)] for o in self.outputs] if roots else []
        numbers = {root: i for i, root in enumerate(dict.fromkeys(found))}
        if len(numbers) < 2:
            return ()
        taken: set[int] = set()
        for number in numbers:
            call = self.roots[number]
            lengths = {o.shape[0] for o, root in zip(self.outputs, found, strict=True) if root == number and o.shape}
            given = [t for t in tree_leaves((call.inputs, call.keywords)) if isinstance(t, Tensor)]
            samples = {id(t) for t in given if t.ndim and t.shape[0] in lengths}
            if samples & taken or any(t.grad_fn is not None for t in given):
                return ()
            taken |= samples
        return tuple(numbers[root] for root in found)

    def finite(self) -> bool:
        """Tell whether all recorded outputs are finite numbers."""
        return all(o.value is not None and bool(o.value.isfinite().all()) for o in self.outputs)

    @contextlib.contextmanager
    def world(self) -> Generator[None]:
        """Put random numbers and buffers where they were before the recorded call, and back afterwards.

        Yields:
            Nothing.
        """
        random, buffers = RandomState.capture(self._parameters.device), self._buffers.now()
        try:
            if self.root is not None and self.root.random is not None:
                self.root.random.restore()
            self._buffers.restore()
            with self._buffers.versions_kept():
                yield
        finally:
            buffers.restore()
            random.restore()

    def _part(self, leaf: Any) -> Any:
        count = batch_size(self.outputs)
        return leaf[self.rows] if isinstance(leaf, Tensor) and leaf.ndim and leaf.shape[0] == count else leaf
