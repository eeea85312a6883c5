"""Two processes that run many checks, since to start a pair takes seconds: `python -m tests.distributed.pair`.

A check is a function of the rank. What it returns on each rank is kept for a test to look at; a rank that waits for
another one in vain fails after a minute.
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib
import subprocess
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

ROOT = Path(__file__).parents[2]
PATIENCE = 60  # seconds


@dataclasses.dataclass(frozen=True)
class Failed:
    """A check that raised."""

    words: str


def run(module: str, folder: Path) -> dict[str, tuple[Any, Any]]:
    """Run the checks of `module` in two processes; return by name what they returned on rank 0 and on rank 1."""
    command = [sys.executable, "-m", "tests.distributed.pair", module, str(folder)]
    processes = [subprocess.Popen([*command, str(rank)], cwd=ROOT) for rank in range(2)]
    try:
        for process in processes:
            process.wait(timeout=5 * PATIENCE)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    found = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]
    return {name: (found[0].get(name), found[1].get(name)) for name in found[0] | found[1]}


def main(module: str, folder: str, number: str) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("error", category=FutureWarning)
    rank = int(number)
    store = dist.FileStore(f"{folder}/store", 2)
    patience = datetime.timedelta(seconds=PATIENCE)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=patience)
    results: dict[str, Any] = {}
    for name, check in importlib.import_module(module).CHECKS.items():
        try:
            results[name] = check(rank)
        except Exception:
            results[name] = Failed(traceback.format_exc())
        torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    from tests.distributed import pair  # under its own name, so that what is saved can be loaded

    pair.main(*sys.argv[1:])
