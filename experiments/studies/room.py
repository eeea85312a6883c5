"""How much memory there is, and numbers of bytes in words."""

import os
from pathlib import Path

import torch

_UNKNOWN = 4 * 2**30  # where a system tells nothing
_CGROUP = Path("/sys/fs/cgroup")


def free_bytes(device: torch.device) -> int:
    """Return the bytes that a process could take now.

    Args:
        device: On the CPU what the system calls available, within the limit of the control group; on CUDA what the
            driver has free; on MPS what Metal recommends, less what torch holds.

    Returns:
        Bytes; 4 GiB where the system does not tell.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    return min(_available(), _group_limit())


def _available() -> int:
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (AttributeError, OSError, ValueError):  # not a Unix
        return _UNKNOWN


def _group_limit() -> int:
    try:
        limit, used = ((_CGROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
        return max(0, int(limit) - int(used))
    except (OSError, ValueError):  # no control group, or "max": no limit
        return 2**62


def in_words(count: float) -> str:
    """Write a number of bytes with a decimal unit and three digits: 1.05 GB."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} PB"
