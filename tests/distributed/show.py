"""What two processes do, in figures: `python -m tests.distributed.show`, a quarter of a minute."""

from __future__ import annotations

import tempfile
from pathlib import Path

from tests.distributed import checks, pair
from tests.distributed.training import PINNED, alone, batches, difference, network, same_bits

CHECKS = {name: checks.CHECKS[name] for name in ("pinned", "defaults", "traffic")}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        found = pair.run("tests.distributed.show", Path(folder))
    failed = [result.words for both in found.values() for result in both if isinstance(result, pair.Failed)]
    if failed:
        raise SystemExit("\n".join(failed))
    first, second = found["pinned"]
    error = difference(first, alone(network(), batches(40, 24), 20, **PINNED))
    print(f"20 pinned steps on 40 and 24 rows against one process on (L1 + L2)/2, float64: {error:.1e} of the norm")
    print(f"the ranks after them, bit for bit: {same_bits(first, second)}")
    print(f"50 default steps in float32, the ranks bit for bit: {same_bits(*found['defaults'])}")
    numbers = sum(p.numel() for p in network().parameters())
    for name, steps in found["traffic"][0].items():
        sent, iterations = steps[-2]
        print(f"{name}: a step of {iterations} iterations on {numbers} parameters hands over {sent} bytes")


if __name__ == "__main__":
    main()
