"""Hooks on the parameters themselves: they change gradients, and are no part of the network."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence

from torch import Tensor


@contextlib.contextmanager
def leaf_hooks_off(params: Sequence[Tensor]) -> Generator[None]:
    """Keep `Tensor.register_hook` of parameters (a clip, a mask, a logger) out of products with the Jacobian.

    The hooks have acted on `p.grad`, as they do for any optimizer. Inside a product they would clip J itself.

    Args:
        params: The parameters.

    Yields:
        Nothing.
    """
    held = [(p._backward_hooks, dict(p._backward_hooks)) for p in params if p._backward_hooks]
    for hooks, _ in held:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, kept in held:
            hooks.update(kept)
