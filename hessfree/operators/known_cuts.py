"""Where a loss was cut before, so that the same loss is cut there at once, and keeps no more than that needs."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from hessfree.operators.base import cut_trace, trace_model
from hessfree.operators.divided_loss import trace_divided
from hessfree.recording import Cut, CutPlace, Path, RandomState, Trace, make_cut
from hessfree.vectors import ParameterVector


def trace_and_cut(
    model: nn.Module, loss_fn: Callable[[Any, Any], Tensor], inputs: Any, targets: Any, parameters: ParameterVector
) -> tuple[Trace, Cut]:
    """Compute `loss_fn(model(inputs), targets)`, and find where the network ends and the loss begins.

    The values that inner calls return are kept only where the last cut of `model` was, for each may be as large as what
    autograd saves there. Where the cut has moved, the same computation is done once more, in the same world. The same
    loss function of the same calls is cut where it was cut before.

    Args:
        model: A module.
        loss_fn: Takes what the model returned, and `targets`; returns a scalar.
        inputs: A tensor, a tuple of positional arguments, or a dict of keyword arguments.
        targets: Passed on to `loss_fn`.
        parameters: The parameters.

    Returns:
        The loss with its graph and its calls, and the cut.

    Raises:
        ValueError: As `trace_model` and `cut_trace`.
    """
    random, known = RandomState.capture(parameters.device), _cuts.get(model)

    def trace(paths: frozenset[Path]) -> Trace:
        return trace_model(model, loss_fn, inputs, targets, parameters, lambda path: len(path) == 1 or path in paths)

    traced = trace(frozenset() if known is None else known.place.paths)
    if known is not None and known.loss() is loss_fn and known.signature == traced.signature():
        cut = make_cut(traced, parameters, known.place)
        if cut.tail.reach == known.reach:
            return traced, cut
    cut = cut_trace(traced, parameters)
    if any(o.value is None for o in cut.outputs):
        traced.buffers.restore()
        random.restore()
        traced = trace(cut.place.paths)
        cut = make_cut(traced, parameters, cut.place)
    with contextlib.suppress(TypeError):  # a loss function that cannot be referred to weakly is not remembered
        _cuts[model] = _KnownCut(weakref.ref(loss_fn), traced.signature(), cut.tail.reach, cut.place)
    return traced, cut


def trace_in_parts(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor],
    inputs: Any,
    targets: Any,
    parameters: ParameterVector,
    microbatch: int | None,
) -> tuple[Trace, Cut, Sequence[slice]]:
    """Do as `trace_and_cut` does, with at most so many samples at a time.

    Args:
        model: A module.
        loss_fn: Takes what the model returned, and `targets`; returns a scalar.
        inputs: A tensor, a tuple of positional arguments, or a dict of keyword arguments.
        targets: Passed on to `loss_fn`.
        parameters: The parameters.
        microbatch: How many samples; None for all.

    Returns:
        The loss, the cut, and the parts of the batch: none where all samples are taken at a time.

    Raises:
        ValueError: As `trace_and_cut` and `trace_divided`.
    """
    divided = None
    if microbatch is not None:
        divided = trace_divided(model, loss_fn, inputs, targets, parameters, microbatch)
    if divided is None:
        return *trace_and_cut(model, loss_fn, inputs, targets, parameters), ()
    uncut = (
        f"the loss is linear in what {type(model).__name__} returned, where microbatch={microbatch} cuts the "
        "network; return what the loss is curved in (logits), or use microbatch=None"
    )
    return divided[0], cut_trace(divided[0], parameters, uncut), divided[1]


class _KnownCut(NamedTuple):
    loss: weakref.ref[Callable[[Any, Any], Tensor]]
    signature: tuple[Any, ...]
    reach: tuple[tuple[int, ...], tuple[int, ...]]
    place: CutPlace


_cuts: weakref.WeakKeyDictionary[nn.Module, _KnownCut] = weakref.WeakKeyDictionary()
