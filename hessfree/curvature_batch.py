"""The network on the first few samples of the recorded batch, where curvature needs no more."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
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
        samples: How many samples it saw; 0 where the outputs share no batch dimension.
        leading: The number of samples, if it is only a part of the batch; else None.
    """

    outputs: tuple[Output, ...]
    calls: tuple[Call, ...]
    sources: tuple[Call, ...]
    samples: int
    leading: int | None = None


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


def evaluate_network(
    recording: Recording,
    cut: Cut,
    size: int | float | None,
    parameters: ParameterVector,
    owners: Owners,
    taps: Callable[[nn.Module], bool],
    warn: Callable[[str], None],
) -> Network:
    """Return the network on the curvature batch: re-run on its first samples, or as recorded.

    The network on a part of the batch must be the same network: its outputs are compared with the recorded
    ones at every step. Where they differ (dropout, BatchNorm in train mode) the whole batch is used.

    Args:
        recording: The closure's run.
        cut: Its cut.
        size: A number of samples, a share of the batch, or None for the whole batch.
        parameters: The parameters.
        owners: Modules to record in the re-run.
        taps: Modules whose inputs to keep.
        warn: Told once why the whole batch is used where a part was asked for.

    Returns:
        The network, whose graph leads to `parameters`.

    Raises:
        ValueError: A part is asked for, and dimension 0 of outputs or inputs is no batch dimension.
    """
    count = _samples(cut)
    whole = Network(cut.outputs, tuple(recording.roots), cut.calls, count)
    if size is None or not cut.outputs:
        return whole
    if count == 0:
        raise ValueError(
            f"curvature_batch={size!r} takes the first samples along dimension 0, but the outputs of the network have "
            f"shapes {[tuple(o.shape) for o in cut.outputs]}; use curvature_batch=None"
        )
    rows = min(count, size if isinstance(size, int) else max(SMALLEST_SHARE, math.ceil(size * count)))
    if rows == count:
        return whole
    reason = _not_sliceable(recording, cut)
    if reason is None:
        part = _rerun(recording, cut, rows, parameters, owners, taps)
        if part is not None:
            return part
        reason = "the network gives other outputs on a part of the batch (dropout, or BatchNorm in train mode)"
    warn(f"curvature_batch={size!r} cannot be used, and the whole batch is: {reason}")
    return whole


def _samples(cut: Cut) -> int:
    counts = {o.shape[0] if o.shape else 0 for o in cut.outputs}
    return counts.pop() if len(counts) == 1 else 0


def _not_sliceable(recording: Recording, cut: Cut) -> str | None:
    if not cut.calls:
        return "mark_outputs marks tensors, and no module can be called again to compute fewer of them"
    if cut.tail.has_direct and cut.tail.coupled:
        return "the loss couples the outputs with parameters that it uses directly"
    roots = {call.path[0] for call in cut.calls}
    if len(roots) > 1:
        return "the outputs come from several calls"
    root = recording.roots[roots.pop()]
    inputs = [t for t in tree_leaves((root.inputs, root.keywords)) if isinstance(t, Tensor)]
    if any(t.grad_fn is not None for t in inputs):
        return f"the inputs of {type(root.module).__name__} depend on other computations that may hold parameters"
    count = _samples(cut)
    if not any(t.ndim and t.shape[0] == count for t in inputs):
        raise ValueError(
            f"curvature_batch takes the first samples along dimension 0: the outputs have {count} there, but the "
            f"inputs of {type(root.module).__name__} have shapes {[tuple(t.shape) for t in inputs]}; use "
            "curvature_batch=None"
        )
    return None


def _rerun(
    recording: Recording,
    cut: Cut,
    rows: int,
    parameters: ParameterVector,
    owners: Owners,
    taps: Callable[[nn.Module], bool],
) -> Network | None:
    root = recording.roots[cut.calls[0].path[0]]
    count = _samples(cut)

    def leading(leaf: Any) -> Any:
        return leaf[:rows] if isinstance(leaf, Tensor) and leaf.ndim and leaf.shape[0] == count else leaf

    inputs, keywords = tree_map(leading, (root.inputs, root.keywords))
    random, buffers = RandomState.capture(parameters.device), recording.before.buffers.now()
    assert root.random is not None
    try:
        root.random.restore()
        recording.before.buffers.restore()
        with torch.enable_grad(), CallTree(owners, parameters.device, taps, lambda _: True) as tree:
            root.module(*inputs, **keywords)
    finally:
        buffers.restore()
        random.restore()
    again = tree.roots[0]
    if again.signature() != root.signature():
        return None
    places = [(call_at([again], (0, *path[1:])), index) for path, index in cut.place.places if path is not None]
    outputs = tuple(call.outputs[index] for call, index in places)
    for new, old in zip(outputs, cut.outputs, strict=True):
        if old.value is None or new.value is None or new.shape != (rows, *old.shape[1:]):
            return None
        difference = (new.value - old.value[:rows]).abs().max()
        if not bool(difference <= torch.finfo(old.dtype).eps ** 0.5 * old.value[:rows].abs().max()):
            return None
    return Network(outputs, (again,), tuple(dict.fromkeys(call for call, _ in places)), rows, rows)
