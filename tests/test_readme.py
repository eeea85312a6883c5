"""What the README shows runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.split("\n")[0][:40])
def test_code_runs(block: str, capsys: pytest.CaptureFixture[str]) -> None:
    import hessfree

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))
    x, y = torch.randn(64, 3), torch.randn(64, 2)
    loader = [(x, y)] * 3
    v = torch.randn(sum(p.numel() for p in model.parameters()))
    names = {"model": model, "loader": loader, "x": x, "y": y, "v": v, "F": F, "HessianFree": hessfree.HessianFree}
    exec(compile(block, "README.md", "exec"), names)
    if "configure_optimizers" in names:
        assert isinstance(names["configure_optimizers"](model), hessfree.HessianFree)
    if "last_step" in block:
        assert "step 3" in capsys.readouterr().out
    if "eigsh" in block:
        printed = [float(number) for number in capsys.readouterr().out.split()]
        true = torch.linalg.eigvalsh(names["G"].to_dense()).flip(0)[:10]
        assert torch.allclose(torch.tensor(printed), true, rtol=1e-4, atol=1e-6 * float(true[0]))


def test_paths_exist() -> None:
    root = Path(__file__).parent.parent
    for path in re.findall(r"\]\((\.[^)]+)\)", README) + re.findall(r"python (scripts/\w+\.py)", README):
        assert (root / path).exists(), path
