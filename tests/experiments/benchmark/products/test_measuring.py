"""What is measured adds up: rows, errors, missing ones and bars. No test looks at a clock."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from experiments.benchmark.products import bars, report, step
from experiments.benchmark.products.implementations import FLOOR, GRADIENT, IMPLEMENTATIONS, OURS, Product
from experiments.benchmark.products.measuring import QUICK, Effort, Truth, measure
from experiments.environment import UsageError
from tests.experiments.benchmark.products.tiny import dense, make


class Wrong(Product):
    """Half of what it should be."""

    name = "wrong"

    def product(self, v: Tensor) -> Tensor:
        return 0.5 * (dense(self.workload) @ v.double()).float()


class Absent(Wrong):
    name = "absent"
    package = "a_package_that_nobody_wrote"
    requirement = "a-package-that-nobody-wrote"


class Failing(Wrong):
    name = "failing"

    def product(self, v: Tensor) -> Tensor:
        raise ArithmeticError("cannot multiply today\nat all")


class Undefined(Wrong):
    name = "undefined"

    def product(self, v: Tensor) -> Tensor:
        return torch.full_like(v, math.nan)


def kinds(*names: str) -> list[type[Product]]:
    return [IMPLEMENTATIONS[name] for name in names]


def test_rows() -> None:
    effort = Effort(rounds=3, least_rounds=2, turn_products=2, turn_seconds=0.0, seconds=0.0, vectors=2)
    rows, missing = measure(make("toy"), [*kinds(OURS, GRADIENT, FLOOR), Wrong, Absent, Failing, Undefined], effort)
    found = {row["implementation"]: row for row in rows}
    assert list(found) == [OURS, GRADIENT, FLOOR, "wrong", "undefined"]
    ours = found[OURS]
    assert ours["ratio_to_ours"] == 1 and ours["detail"] in {"traced", "graph"} and ours["model"] == "toy"
    assert ours["error"] <= 1e-5 and found[GRADIENT]["error"] <= 1e-5 and found[FLOOR]["error"] <= 1e-5
    assert found["wrong"]["error"] == pytest.approx(0.5, rel=1e-4) and found["undefined"]["error"] is None
    for row in rows:
        assert (row["setups"], row["products"]) == (2, 4)  # the least turns, since no seconds are given
        low, high = row["quartiles_ms"]
        assert 0 < low <= row["median_ms"] <= high and row["setup_ms"] >= 0
        assert row["ratio_to_ours"] == pytest.approx(row["median_ms"] / ours["median_ms"])
        assert row["totals_ms"]["50"] == pytest.approx(row["setup_ms"] + 50 * row["median_ms"])
        assert list(row["totals_ms"]) == ["1", "3", "10", "50"]
    assert found[GRADIENT]["peak_ratio"] == 1 and ours["peak_ratio"] > 0
    assert missing == [
        {
            "model": "toy",
            "implementation": "absent",
            "reason": "absent: pip install a-package-that-nobody-wrote",
        },
        {"model": "toy", "implementation": "failing", "reason": "fails: ArithmeticError: cannot multiply today"},
    ]


def test_parameters_move_between_rounds_and_all_follow() -> None:
    workload = make("perceptron")
    now = [p.detach() for p in workload.parameters]
    before = [p.clone() for p in now]
    measure(workload, kinds(OURS), Effort(rounds=2, turn_seconds=0.0, turn_products=1))
    change = [float((p - b).norm() / b.norm()) for p, b in zip(now, before, strict=True)]
    assert all(1e-4 < one < 1e-2 for one in change)


def test_the_truth_is_float64() -> None:
    workload = make("convolutions")
    v = workload.vector(torch.Generator().manual_seed(0))
    truth = Truth(workload, [v])
    assert truth.error(Wrong, [dense(workload) @ v.double()]) <= 1e-12
    assert math.isnan(truth.error(Wrong, [torch.full_like(v, math.nan)]))


def test_without_ours_there_is_nothing_to_compare_with() -> None:
    with pytest.raises(UsageError, match="hessfree cannot be measured on toy: not asked for"):
        measure(make("toy"), kinds(GRADIENT), QUICK)


@pytest.mark.parametrize("settings", [{"rounds": 0}, {"turn_products": 0}, {"vectors": 0}])
def test_an_effort_that_measures_nothing(settings: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="1 or more"):
        Effort(**settings)


def row(model: str, name: str, median: float, **others: Any) -> dict[str, Any]:
    return {
        "model": model,
        "implementation": name,
        "median_ms": median,
        "quartiles_ms": [0.9 * median, 1.1 * median],
        "ratio_to_ours": median / 2,
        "error": 1e-7,
        "setup_ms": 1.0,
        "first_ms": 1500.0,
        "totals_ms": {"1": 3.0, "3": 7.0, "10": 21.0, "50": 101.0},
        "peak_ratio": 1.5,
        "detail": "",
    } | others


ROWS = [
    row("toy784", OURS, 2.0, detail="traced"),
    row("toy784", GRADIENT, 4.0),
    row("toy784", FLOOR, 1.6),
    row("toy784", "JAX, jvp + vjp", 3.0),
    row("toy784", "JAX, double reverse", 2.5, peak_ratio=None, error=None),
    row("toy784", "curvlinops", 15.0),
    row("resnet18", OURS, 10.0, peak_ratio=None),
]


def test_bars() -> None:
    judged = bars.judge(ROWS, {"model": "x", "ratio": 1.1}, {"toy784": {"K-FAC": 2.5}}, {"toy784": 0.25})
    found = {(bar["bar"], bar["model"]): (bar["value"], bar["limit"], bar["met"]) for bar in judged}
    assert found == {
        ("product / GEMM floor", "toy784"): (1.25, 1.15, False),
        ("product / best of JAX", "toy784"): (0.8, 1.0, True),
        ("curvlinops / product", "toy784"): (7.5, 7.0, True),
        ("product / gradient", "toy784"): (0.5, None, None),
        ("set-up of a step / gradient", "toy784"): (0.25, 0.5, True),
        ("set-up by from_loss / gradient", "toy784"): (0.25, None, None),
        ("peak memory of a product / gradient's", "toy784"): (1.5, 1.3, False),
        ("peak memory of a step (K-FAC) / gradient's", "toy784"): (2.5, 2.0, False),
        ("step / sum of its parts", "x"): (1.1, 1.15, True),
    }


def test_tables_name_what_is_missing() -> None:
    missing = [{"model": "toy784", "implementation": "BackPACK", "reason": "absent: pip install backpack"}]
    text = report.table(ROWS, missing, {"toy784": "ToyMLP", "resnet18": "ResNet"})
    lines = text.splitlines()
    assert "### ToyMLP" in lines and "### ResNet" in lines
    assert "| hessfree (traced) | 2 (1.8 - 2.2) | 1.00 | 1e-07 | 1 | 1.50 | 3 | 7 | 21 | 101 | 1.50 |" in lines
    assert "| JAX, double reverse | 2.5 (2.25 - 2.75) | 1.25 | not finite | 1 | 1.50 | 3 | 7 | 21 | 101 | - |" in lines
    [absent] = [line for line in lines if "BackPACK" in line]
    assert "absent: pip install backpack" in absent
    table = [line for line in lines if line.startswith("|")]
    assert len({line.count("|") for line in table}) == 1
    judged = bars.judge(ROWS, None, {}, {})
    assert all(bar["limit"] is None and bar["met"] is None for bar in bars.judge(ROWS, None, {}, {}, limits=False))
    assert "| product / GEMM floor | ToyMLP | 1.25 | at most 1.15 | **missed** |" in report.bars_table(
        judged, {"toy784": "ToyMLP", "resnet18": "ResNet"}
    )


def test_a_step_and_its_parts() -> None:
    found = step.measure(step.make(small=True), rounds=2)
    least = min(found["setup_reported_ms"], found["setup_from_loss_ms"])
    parts = found["closure_ms"] + least + 3 * found["product_ms"] + found["replay_ms"]
    assert found["ratio"] == pytest.approx(found["step_ms"] / parts)
    assert "32" in report.step_line(found)


def test_peaks_of_steps() -> None:
    ratios = step.peak_ratios(make("toy"), steps=1)
    assert set(ratios) == {"no preconditioner", "K-FAC"} and all(0.5 < one < 1000 for one in ratios.values())
