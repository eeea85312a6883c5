"""How many of the recorded samples the curvature is formed on."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor
from torch.utils._pytree import tree_leaves

from hessfree.linearization import batch_size, single_root
from hessfree.recording import Cut, Recording

SMALLEST_SHARE = 256  # a share of the batch never means fewer samples: below that curvature is noise


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
    count = batch_size(cut.outputs)
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


def _not_sliceable(recording: Recording, cut: Cut) -> str | None:
    root, reason = single_root(recording.roots, cut.calls)
    if root is None:
        return reason
    if cut.tail.has_direct and cut.tail.coupled:
        return "the loss couples the outputs with parameters that it uses directly"
    count = batch_size(cut.outputs)
    inputs = [t for t in tree_leaves((root.inputs, root.keywords)) if isinstance(t, Tensor)]
    if not any(t.ndim and t.shape[0] == count for t in inputs):
        raise ValueError(
            f"curvature_batch takes the first samples along dimension 0: the outputs have {count} there, but the "
            f"inputs of {type(root.module).__name__} have shapes {[tuple(t.shape) for t in inputs]}; use "
            "curvature_batch=None"
        )
    return None
