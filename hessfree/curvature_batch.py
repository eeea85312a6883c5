"""The network on the first few samples of the recorded batch, where curvature needs no more."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Generator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from hessfree.recording import Call, CallTree, Cut, Output, Owners, RandomState, Recording, call_at
from hessfree.vectors import ParameterVector

SMALLEST_SHARE = 256  # a share of the batch never means fewer samples: below that curvature is noise


@dataclasses.dataclass(frozen=True, eq=False)
class Network:
    """One evaluation of the network with its graph.

    Attributes:
        outputs: z of the evaluated samples.
        calls: The outermost recorded calls, for taps.
        sources: The calls that z came from; empty if z was marked.
    """

    outputs: tuple[Output, ...]
    calls: tuple[Call, ...]
    sources: tuple[Call, ...]


def check_curvature_batch(size: int | float | None) -> None:
    """Check the setting.

    Args:
        size: A number of samples, a share of the batch, or None.

    Raises:
        ValueError: It is none of these.
    """
    if size is None:
        return
    whole = isinstance(size, int) and not isinstance(size, bool) and size >= 1
    share = isinstance(size, float) and 0 < size <= 1
    if not (whole or share):
        raise ValueError(
            f"curvature_batch={size!r} must be a number of samples (an int, 1 or more), a share of the batch "
            "(a float in (0, 1]) or None for the whole batch"
        )


def leading_rows(recording: Recording, cut: Cut, size: int | float | None, warn: Callable[[str], None]) -> int | None:
    """Return how many samples, the first of the batch, the curvature is to be formed on.

    Args:
        recording: The closure's run.
        cut: Its cut.
        size: A number of samples, a share of the batch, or None for the whole batch.
        warn: Told once why the whole batch is used where a part was asked for.

    Returns:
        The number, or None for the whole batch.

    Raises:
        ValueError: A part is asked for, and dimension 0 of outputs or inputs is no batch dimension.
    """
    if size is None:
        return None
    count = batch_size(cut)
    if count == 0:
        raise ValueError(
            f"curvature_batch={size!r} takes the first samples along dimension 0, but the outputs of the network have "
            f"shapes {[tuple(o.shape) for o in cut.outputs]}; use curvature_batch=None"
        )
    rows = min(count, size if isinstance(size, int) else max(SMALLEST_SHARE, math.ceil(size * count)))
    if rows == count:
        return None
    reason = _not_sliceable(recording, cut)
    if reason is None:
        return rows
    warn(f"curvature_batch={size!r} cannot be used, and the whole batch is: {reason}")
    return None


def batch_size(cut: Cut) -> int:
    """Return N, the size of dimension 0 of every output; 0 where they share none."""
    counts = {o.shape[0] if o.shape else 0 for o in cut.outputs}
    return counts.pop() if len(counts) == 1 else 0


def single_root(recording: Recording, cut: Cut) -> tuple[Call | None, str]:
    """Return the one outermost call that all of z comes from, if its inputs do not depend on other computations.

    Args:
        recording: The closure's run.
        cut: Its cut.

    Returns:
        The call, or None and the reason why there is none.
    """
    if not cut.calls:
        return None, "mark_outputs marks tensors, and no module can be called again to compute them"
    roots = {call.path[0] for call in cut.calls}
    if len(roots) > 1:
        return None, "the outputs come from several calls"
    root = recording.roots[roots.pop()]
    if any(isinstance(t, Tensor) and t.grad_fn is not None for t in tree_leaves((root.inputs, root.keywords))):
        name = type(root.module).__name__
        return None, f"the inputs of {name} depend on other computations that may hold parameters"
    return root, ""


def _not_sliceable(recording: Recording, cut: Cut) -> str | None:
    root, reason = single_root(recording, cut)
    if root is None:
        return reason
    if cut.tail.has_direct and cut.tail.coupled:
        return "the loss couples the outputs with parameters that it uses directly"
    count = batch_size(cut)
    inputs = [t for t in tree_leaves((root.inputs, root.keywords)) if isinstance(t, Tensor)]
    if not any(t.ndim and t.shape[0] == count for t in inputs):
        raise ValueError(
            f"curvature_batch takes the first samples along dimension 0: the outputs have {count} there, but the "
            f"inputs of {type(root.module).__name__} have shapes {[tuple(t.shape) for t in inputs]}; use "
            "curvature_batch=None"
        )
    return None


class Evaluation:
    """The network on the whole batch, or on its first rows; evaluated again only where that is needed.

    The network on a part of the batch must be the same network, and so must any other way to evaluate it: `agrees`
    compares outputs with the recorded ones.

    Attributes:
        rows: Samples in the part; None for the whole batch.
        samples: Samples seen; 0 where the outputs share no batch dimension.
        root: The one call to evaluate again, or None.
        arguments: Its positional and keyword arguments, the tensors cut to the part.
    """

    def __init__(
        self,
        recording: Recording,
        cut: Cut,
        rows: int | None,
        parameters: ParameterVector,
        owners: Owners,
        taps: Callable[[nn.Module], bool],
    ) -> None:
        """Describe the evaluation.

        Args:
            recording: The closure's run.
            cut: Its cut.
            rows: How many samples; None for all.
            parameters: The parameters.
            owners: Modules to record in a second run.
            taps: Modules whose inputs to keep.
        """
        self._recording, self._cut, self._parameters = recording, cut, parameters
        self._owners, self._taps = owners, taps
        self.rows = rows
        self.samples = batch_size(cut) if rows is None else rows
        self.root, _ = single_root(recording, cut)
        self.arguments: tuple[Any, Any] = ((), {})
        if self.root is not None:
            self.arguments = (self.root.inputs, self.root.keywords)
            if rows is not None:
                self.arguments = tree_map(self._leading, self.arguments)

    @functools.cached_property
    def network(self) -> Network | None:
        """The network with its graph; None where a part of the batch meets another network."""
        if self.rows is None:
            return Network(self._cut.outputs, tuple(self._recording.roots), self._cut.calls)
        assert self.root is not None
        tree = CallTree(self._owners, self._parameters.device, self._taps, lambda _: True)
        inputs, keywords = self.arguments
        with self.world(), torch.enable_grad(), tree:
            self.root.module(*inputs, **keywords)
        again = tree.roots[0]
        if again.signature() != self.root.signature():
            return None
        found = [(call_at([again], (0, *path[1:])), i) for path, i in self._cut.place.places if path is not None]
        outputs = tuple(call.outputs[i] for call, i in found)
        if not self.agrees([o.value for o in outputs]):
            return None
        return Network(outputs, (again,), tuple(dict.fromkeys(call for call, _ in found)))

    def agrees(self, values: Sequence[Tensor | None]) -> bool:
        """Tell whether `values`, one an output, are the recorded ones but for rounding.

        Args:
            values: From another evaluation of the same samples.

        Returns:
            Whether they agree to the square root of the precision (a part of the batch may be multiplied in another
            order), relative to the largest.
        """
        for new, old in zip(values, self._cut.outputs, strict=True):
            if new is None or old.value is None or not old.intact:
                return False
            known = old.value if self.rows is None else old.value[: self.rows]
            if new.shape != known.shape:
                return False
            if not bool((new - known).abs().max() <= torch.finfo(old.dtype).eps ** 0.5 * known.abs().max()):
                return False
        return True

    @contextlib.contextmanager
    def world(self) -> Generator[None]:
        """Put random numbers and buffers where they were before the recorded call, and back afterwards.

        Yields:
            Nothing.
        """
        before = self._recording.before.buffers
        random, buffers = RandomState.capture(self._parameters.device), before.now()
        try:
            if self.root is not None and self.root.random is not None:
                self.root.random.restore()
            before.restore()
            yield
        finally:
            buffers.restore()
            random.restore()

    def _leading(self, leaf: Any) -> Any:
        count = batch_size(self._cut)
        return leaf[: self.rows] if isinstance(leaf, Tensor) and leaf.ndim and leaf.shape[0] == count else leaf
