"""The most memory that a function holds at one moment, counted by torch's own allocator."""

import gc
import os
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


def peak_bytes(function: Callable[[], Any], device: torch.device | str = "cpu") -> int:
    """Call `function` and return the most bytes of tensors that it held above what was held before.

    On the CPU every allocation and deallocation of torch's allocator is an event of the profiler, temporaries inside
    operators included; the running sum of these events has a maximum, and that is returned. Scratch memory that a
    library takes from the system itself (MKL's packing buffers) is in no tensor and is not counted. On CUDA the
    caching allocator keeps the number. What `function` does for the first time (tracing, fixed buffers that stay) is
    counted too: call it once before, unless that is what is asked for.

    Args:
        function: What to call. What it returns counts as held until it has returned.
        device: Where its tensors live.

    Returns:
        Bytes, 0 or more.

    Raises:
        ValueError: The allocator of `device` keeps no such number.
    """
    kind = torch.device(device).type
    if kind not in {"cpu", "cuda"}:
        raise ValueError(f"{device=} has no allocator that counts its peak; measure on 'cpu' or 'cuda'")
    # garbage of an earlier call must not be freed, or seem to be held, in the middle of this one
    gc.collect()
    return _peak_on_cuda(function, device) if kind == "cuda" else _peak_on_cpu(function)


def _peak_on_cpu(function: Callable[[], Any]) -> int:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler reports each start and stop
    collecting = gc.isenabled()
    gc.disable()  # a cycle is memory that a caller would have to wait for, whenever the collector happens to run
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            returned = function()
        del returned
    finally:
        if collecting:
            gc.enable()
    results: Any = profiler.profiler
    changes = [(e.start_ns(), e.nbytes()) for e in results.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for _, change in sorted(changes, key=lambda event: event[0]):
        held += change
        most = max(most, held)
    return most


def _peak_on_cuda(function: Callable[[], Any], device: torch.device | str) -> int:
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    function()
    torch.cuda.synchronize(device)
    return max(0, torch.cuda.max_memory_allocated(device) - before)
