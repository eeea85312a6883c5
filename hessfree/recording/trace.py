"""What is known of a loss after it was computed: its graph, the calls that led to it, the outputs that were marked."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Generator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from hessfree.recording.buffers import BufferStates
from hessfree.recording.calls import Call, CallTree, Output
from hessfree.recording.twice import twice_differentiable

_marking: list[list[Output]] = []


def mark_outputs(outputs: Any) -> Any:
    """Say that the Gauss-Newton cut is here: the network ends and the loss begins at `outputs`.

    The curvature is then JᵀHJ with J the Jacobian of `outputs` in the parameters and H the Hessian of
    the loss in `outputs`. Needed only where no module returns them: the residual of a differential
    equation, a model that returns its own loss. Several calls in one closure mark several outputs; what
    else the loss uses is searched for the outputs of modules, as without marks.

    Args:
        outputs: A tensor, or any nesting of tuples, lists and dicts of tensors.

    Returns:
        `outputs`, unchanged. Outside a closure that `HessianFree.step` runs, nothing else happens.

    Raises:
        ValueError: One of them is complex.
    """
    for t in tree_leaves(outputs):
        if isinstance(t, Tensor) and t.is_complex():
            raise ValueError(
                f"mark_outputs was given a tensor of dtype {t.dtype}, and the Gauss-Newton matrix is real; "
                "mark its real view: torch.view_as_real(z)"
            )
    if _marking:
        _marking[-1].extend(Output.all_of(outputs))
    return outputs


@contextlib.contextmanager
def collect_marks() -> Generator[list[Output]]:
    """Collect what `mark_outputs` is given inside.

    Yields:
        The list that fills.
    """
    marks: list[Output] = []
    _marking.append(marks)
    try:
        yield marks
    finally:
        _marking.pop()


@dataclasses.dataclass(eq=False)
class Trace:
    """A loss with its graph.

    Attributes:
        loss: A scalar with its graph.
        roots: The outermost calls of modules that own parameters.
        marks: What `mark_outputs` was given.
        buffers: The buffers of the modules called, as they were before.
    """

    loss: Tensor
    roots: list[Call]
    marks: list[Output]
    buffers: BufferStates

    def signature(self) -> tuple[Any, ...]:
        """Return what stays the same as long as the loss calls the same modules in the same way."""
        return (len(self.marks), tuple(call.signature() for call in self.roots))


def trace_loss(function: Callable[[], Tensor], tree: CallTree) -> Trace:
    """Call `function` and keep what a cut needs to know.

    Args:
        function: Computes a loss and calls no backward.
        tree: Records the module calls; entered here.

    Returns:
        The trace of what `function` returned.
    """
    with torch.enable_grad(), twice_differentiable(), collect_marks() as marks, tree:
        loss = function()
    return Trace(loss, tree.roots, marks, tree.buffers)
