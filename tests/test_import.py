"""What `import hessfree` brings in, beside what torch brings."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import json, sys
import torch
before = set(sys.modules)
import hessfree
print(json.dumps([sorted(before), sorted(set(sys.modules) - before)]))
"""
HEAVY = ("lightning", "pytorch_lightning", "scipy", "sympy", "torch._dynamo", "torch._inductor", "torchvision")


def test_nothing_heavy_is_imported() -> None:
    """No optional dependency, and of torch itself nothing that it would not import for everyone."""
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, cwd=root)
    before, added = json.loads(done.stdout)
    assert "hessfree" in added and "torch" in before
    assert not [name for name in added for heavy in HEAVY if name == heavy or name.startswith(f"{heavy}.")]
    # make_fx lives in torch.fx.experimental.proxy_tensor, which some releases of torch import themselves
    assert not [name for name in added if name.startswith("torch.fx")]
    assert {name.partition(".")[0] for name in added} <= {"hessfree", "torch", *sys.stdlib_module_names}
