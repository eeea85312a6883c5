"""What a closure must not do, each with an error that names the cure."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from hessfree.recording.calls import Call
from hessfree.recording.tail import walk


def check_closure(closure: Callable[[], Any] | None) -> Callable[[], Any]:
    """Return `closure`.

    Args:
        closure: What `step` was given.

    Raises:
        RuntimeError: It was given none.
    """
    if closure is None:
        raise RuntimeError(
            "HessianFree.step() was called without a closure, and needs one: def closure(): optimizer.zero_grad(); "
            "loss = ...; loss.backward(); return loss. (A GradScaler and precision='16-mixed' call step() without "
            "one: use bfloat16 or float32 there)"
        )
    return closure


def check_reached(roots: Sequence[Call], gradients: int) -> None:
    """Check that a closure's backward reached the parameters, and that its batch was not empty.

    Args:
        roots: The outermost calls that it made.
        gradients: How many gradients its backward accumulated.

    Raises:
        RuntimeError: None.
        ValueError: All outputs of the network are empty.
    """
    if not gradients:
        raise RuntimeError(
            "the loss does not depend on any parameter of this optimizer: backward() left their gradients "
            "untouched. Was the optimizer built from another model, or the output detached?"
        )
    shapes = [tuple(o.shape) for call in roots for o in call.outputs]
    if shapes and all(0 in shape for shape in shapes):
        raise ValueError(f"the batch is empty: the outputs of the network have shapes {shapes}; skip such batches")


def check_returned(returned: Any, backward_seen: bool, differentiated: Sequence[Tensor]) -> None:
    """Check what a closure returned.

    Args:
        returned: Should be a scalar tensor; with a graph, if backward was not called.
        backward_seen: Whether the closure called backward.
        differentiated: What it gave to `torch.autograd.grad`.

    Raises:
        TypeError: It returned no tensor.
        ValueError: It returned several numbers.
        RuntimeError: It called no backward, and returned nothing to call it on.
    """
    if not isinstance(returned, Tensor):
        raise TypeError(
            f"the closure returned {returned!r} of type {type(returned).__name__}, not a tensor; "
            "end it with `return loss`"
        )
    if returned.numel() != 1:
        raise ValueError(
            f"the closure returned a tensor of shape {tuple(returned.shape)}, not a scalar; "
            "reduce it first, for example return loss.mean()"
        )
    if backward_seen:
        return
    if any(t is returned for t in differentiated):
        raise RuntimeError(
            "the closure called torch.autograd.grad on the loss, which HessianFree cannot follow; "
            "call loss.backward() instead and leave p.grad as it fills it"
        )
    if not returned.requires_grad:
        raise RuntimeError(
            f"the closure returned a loss without a graph ({returned!r}) and never called backward(); call "
            "loss.backward() in the closure, or return the loss itself, without detach(), item() or torch.no_grad()"
        )


def check_unscaled(loss: Tensor, returned: Tensor) -> None:
    """Refuse a loss multiplied by a GradScaler: its scale changes from step to step, and G with it.

    A GradScaler's scale is a power of two in a float32 tensor (a Python number would be saved as float64 or
    int64), and what the closure returns is the loss without it.

    Args:
        loss: What backward was called on.
        returned: What the closure returned.

    Raises:
        RuntimeError: `loss` is the scaled `returned`.
    """
    factor = getattr(loss.grad_fn, "_saved_other", None)
    if not isinstance(factor, Tensor) or factor.shape or factor.dtype != torch.float32 or factor.requires_grad:
        return
    scale, value = float(factor), float(returned.detach())
    if scale >= 2 and math.log2(scale).is_integer() and float(loss.detach()) == scale * value != 0:
        raise RuntimeError(
            f"backward was called on {scale:g} times the loss that the closure returned, as a GradScaler does; "
            "HessianFree needs the loss itself: drop the GradScaler and use bfloat16 autocast or float32"
        )


def check_differentiable_again(loss: Tensor) -> None:
    """Refuse a reentrant checkpoint, whose graph only a plain backward() can walk.

    Args:
        loss: A scalar with its graph.

    Raises:
        RuntimeError: There is one in the graph.
    """
    for node, _ in walk(get_gradient_edge(loss), {}):
        if node.name() == "CheckpointFunctionBackward":
            raise RuntimeError(
                "the model uses torch.utils.checkpoint with use_reentrant=True, which can be differentiated by "
                "backward() only, and HessianFree needs products with the Jacobian; pass use_reentrant=False"
            )


def gradient_versions(params: Sequence[Tensor]) -> list[tuple[Tensor | None, int]]:
    """Return each parameter's gradient, and how often it has been written into."""
    return [(p.grad, 0 if p.grad is None else p.grad._version) for p in params]


def check_gradients_untouched(params: Sequence[Tensor], before: Sequence[tuple[Tensor | None, int]]) -> None:
    """Refuse gradients that came from elsewhere than an intercepted backward call.

    Args:
        params: The parameters.
        before: What `gradient_versions` said before the closure ran.

    Raises:
        RuntimeError: The closure filled a gradient in another way. (Older releases of torch do not let
            torch.autograd.backward be intercepted.)
    """
    for p, (grad, version) in zip(params, before, strict=True):
        if p.grad is None or (p.grad is grad and p.grad._version == version):
            continue
        if bool(p.grad.any()):  # zeroed in place is as good as cleared
            raise RuntimeError(
                "the closure filled p.grad without loss.backward(): it called torch.autograd.backward, or assigned "
                "gradients itself, which HessianFree cannot follow; call loss.backward() instead"
            )


def not_repeated(loss: float, again: float) -> str:
    """Say that a closure cannot be replayed.

    Args:
        loss: What it computed.
        again: The same, at the same parameters and random state.

    Returns:
        A warning, with the cure.
    """
    return (
        f"the closure gave a loss of {loss:.6g}, and {again:.6g} when it was called again with the same "
        "parameters and random state: it draws data, or from a numpy Generator, or carries a state from call "
        "to call. Draw the batch before the closure. As it is, the damping stays fixed and only steps that are "
        "not finite are rejected"
    )


def not_moved(loss: float) -> str:
    """Say that a closure does not look at the parameters.

    Args:
        loss: What it computed, before and after a step.

    Returns:
        A warning, with the cure.
    """
    return (
        f"the loss stayed at {loss:.6g} when the parameters changed: the closure computes it from what "
        "was evaluated before. Move the forward pass into the closure. As it is, the damping stays fixed"
    )
