"""Autocast: what was on while a network ran, and how to go back to it or to leave it."""

from __future__ import annotations

import contextlib

import torch

Autocast = tuple[tuple[str, torch.dtype], ...]  # kinds of device with the dtype that operators are cast to


def autocast_now(device: torch.device) -> Autocast:
    """Return where autocast is on: on the CPU, and on the kind of `device`."""
    kinds = (kind for kind in dict.fromkeys(("cpu", device.type)) if kind != "meta")
    return tuple((kind, torch.get_autocast_dtype(kind)) for kind in kinds if torch.is_autocast_enabled(kind))


def autocast_as(wanted: Autocast, device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Switch autocast to what it was; asked for at every product, and nearly free where nothing changes.

    Args:
        wanted: From `autocast_now`; empty for off.
        device: Where the parameters live.

    Returns:
        A context to enter.
    """
    now = autocast_now(device)
    if now == wanted:
        return contextlib.nullcontext()
    stack = contextlib.ExitStack()
    for kind, _ in now:
        stack.enter_context(torch.autocast(kind, enabled=False))
    for kind, dtype in wanted:  # casts of parameters are not kept: other tensors stand in for them when traced
        stack.enter_context(torch.autocast(kind, dtype=dtype, cache_enabled=False))
    return stack
