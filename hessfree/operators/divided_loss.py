"""A loss whose network was evaluated chunk by chunk, so that no graph of all samples was ever there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from hessfree.linearization import chunks_of, run_divided
from hessfree.operators.base import check_loss
from hessfree.recording import CallTree, Owners, Trace, trace_loss
from hessfree.vectors import ParameterVector


def trace_divided(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor],
    inputs: Any,
    targets: Any,
    parameters: ParameterVector,
    size: int,
) -> tuple[Trace, list[slice]] | None:
    """Compute `loss_fn(model(inputs), targets)` from chunks of the model's outputs.

    The loss sees all outputs at once, hence a mean stays the mean over all samples, whatever weights or ignored
    targets its denominator counts.

    Args:
        model: A module.
        loss_fn: Takes what the model returned, and `targets`; returns a scalar.
        inputs: A tensor, a tuple of positional arguments, or a dict of keyword arguments.
        targets: Passed on to `loss_fn`.
        parameters: The parameters.
        size: Samples in a chunk.

    Returns:
        The loss, whose graph begins at the outputs of the model, and the chunks; None where one chunk holds all
        samples.

    Raises:
        ValueError: The loss is no scalar tensor with a graph; or it cannot be divided, since the model returns tensors
            without samples, or the loss depends on the network in other ways than through what the model returned.
        LinearizationError: The model mixes samples.
    """
    divided = run_divided(model, inputs, parameters, size)
    if divided is None:
        return None
    tree = CallTree(Owners(parameters), parameters.device, lambda _: False, lambda _: False)
    tail = trace_loss(lambda: loss_fn(divided.returned, targets), tree)
    check_loss(tail.loss, model)
    if tail.roots or tail.marks:
        what = f"calls {type(tail.roots[0].module).__name__}" if tail.roots else "calls mark_outputs"
        raise ValueError(
            f"microbatch={size} cuts the network at what the model returned, and loss_fn {what}; move that into the "
            "model, or use microbatch=None"
        )
    return Trace(tail.loss, divided.roots, [], divided.buffers), chunks_of(divided.samples, size)
