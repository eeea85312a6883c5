"""The studies of products and Gram matrices, at their smallest. No test looks at a clock."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments.studies import contraction_order, fisher_product, jacobian_gram
from tests.experiments.scripts import main_of


@pytest.mark.parametrize(
    ("name", "part", "forms"),
    [
        ("fisher-product", "sizes", set(fisher_product._STYLES)),
        ("jacobian-gram", "networks", set(jacobian_gram._STYLES)),
        ("contraction-order", "orders", {contraction_order.LEFT, contraction_order.RIGHT, "torch.linalg.multi_dot"}),
    ],
)
def test_all_forms_give_the_truth(name: str, part: str, forms: set[str], tmp_path: Path) -> None:
    main = main_of("benchmark")
    assert main([name, "--quick", "--threads", "1", "--out", str(tmp_path), "--parts", part]) == 0
    content = json.loads((tmp_path / "results.json").read_text())
    assert {row["form"] for row in content["rows"]} == forms
    assert all(row["error"] is not None for row in content["rows"]) and 0 < content["max_error"] <= 1e-5
    assert (tmp_path / f"{name}.png").stat().st_size > 10_000
