"""How many of the recorded samples the curvature is formed on, and how many at a time."""

from __future__ import annotations

import math
from collections.abc import Callable

from hessfree.linearization import batch_size, chunks_of, single_root, without_samples
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
    setting = f"curvature_batch={size!r}"
    count = _batch_size(cut, setting)
    rows = min(count, size if isinstance(size, int) else max(SMALLEST_SHARE, math.ceil(size * count)))
    if rows == count:
        return None
    reason = _indivisible(recording, cut, setting)
    if reason is None and cut.tail.has_direct and cut.tail.coupled:
        reason = "the loss couples the outputs with parameters that it uses directly"
    if reason is None:
        return rows
    warn(f"{setting} cannot be used, and the whole batch is: {reason}")
    return None


def chunks(
    recording: Recording, cut: Cut, rows: int | None, size: int | None, warn: Callable[[str], None]
) -> list[slice]:
    """Return the parts of the curvature batch that products are to be made of.

    Args:
        recording: The closure's run.
        cut: Its cut.
        rows: What `leading_rows` returned.
        size: How many samples at a time; None for all.
        warn: Told once why all samples are taken at a time where fewer were asked for.

    Returns:
        At least two parts; none where all samples are to be taken at a time.

    Raises:
        ValueError: Parts are asked for, and dimension 0 of outputs or inputs is no batch dimension.
    """
    if size is None:
        return []
    setting = f"microbatch={size!r}"
    count = _batch_size(cut, setting) if rows is None else rows
    if count <= size:
        return []
    reason = _indivisible(recording, cut, setting)
    if reason is None:
        return chunks_of(count, size)
    warn(f"{setting} cannot be used, and products take all samples at a time: {reason}")
    return []


def _batch_size(cut: Cut, setting: str) -> int:
    count = batch_size(cut.outputs)
    if count == 0:
        raise ValueError(
            f"{setting} divides the batch along dimension 0, but the outputs of the network have shapes "
            f"{[tuple(o.shape) for o in cut.outputs]}; use {setting.partition('=')[0]}=None"
        )
    return count


def _indivisible(recording: Recording, cut: Cut, setting: str) -> str | None:
    """Return why the network cannot be evaluated on a part of the batch, or None."""
    root, reason = single_root(recording.roots, cut.calls)
    if root is None:
        return reason
    reason = without_samples(root, batch_size(cut.outputs))
    if reason:
        raise ValueError(
            f"{setting} divides the batch along dimension 0, but {reason}; use {setting.partition('=')[0]}=None"
        )
    return None
