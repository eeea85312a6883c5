"""The studies' own measurements, small. No test looks at a clock."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.studies import STUDIES, flow_likelihood, input_jacobian, matmul_vjp
from experiments.studies.base import Scope
from tests.experiments.scripts import main_of

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def main() -> Callable[[list[str]], int]:
    return main_of("benchmark")


def quick() -> Scope:
    return Scope(CPU, room=10**9, quick=True, say=lambda line: None)


def run(main: Any, out: Path, name: str, *parts: str) -> dict[str, Any]:
    assert main([name, "--quick", "--threads", "1", "--out", str(out), "--parts", *parts]) == 0
    assert (out / f"{name}.png").stat().st_size > 10_000
    return json.loads((out / "results.json").read_text())


def test_every_study_asks_a_question() -> None:
    for name, study in STUDIES.items():
        assert study.name == name and study.question.endswith("?") and study.parts


def test_matmul_vjp(main: Any, tmp_path: Path) -> None:
    content = run(main, tmp_path, "matmul-vjp", "agreement", "gram-backward", "gram-both")
    assert 0 < content["max_error"] <= 1e-5
    rows = content["rows"]
    assert {row["part"] for row in rows} == {"agreement", "gram-backward", "gram-both"}
    agreement = [(row["product"], row["form"]) for row in rows if row["part"] == "agreement"]
    forms = ["closed form", "hessfree", "autograd", "dense Jacobian"]
    assert agreement == [(product, form) for product in ("AᵀA", "AB") for form in forms]
    backward = {row["form"]: row["peak_bytes"] for row in rows if row["part"] == "gram-backward"}
    assert backward["closed form"] == backward["hessfree"] < backward["autograd"]


@pytest.mark.parametrize("name", ["gram", "gram-large", "matmul"])
def test_the_dense_jacobians_of_the_full_sizes_do_not_fit(name: str) -> None:
    b, m, n, *rest = matmul_vjp._SIZES[name]
    small = matmul_vjp._Problem(quick(), (2, 3, 4, *[5] * len(rest)))
    columns = 3 * 4 + (4 * 5 if rest else 0)
    assert small.dense_bytes(True) == 4 * 2 * (3 * 5 if rest else 4 * 4) * columns
    assert small.dense_bytes(False) == 2 * small.dense_bytes(True)
    assert 4 * b * (m * rest[0] if rest else n * n) * (m * n + (n * rest[0] if rest else 0)) > 10**12


def test_input_jacobian(main: Any, tmp_path: Path) -> None:
    content = run(main, tmp_path, "input-jacobian", "batch-3", "batch-32", "false", "grad-outputs", "devices")
    assert 0 < content["max_error"] <= 1e-5
    rows = content["rows"]
    loops = {(row["B"], row["form"]): row for row in rows if row["measured"] == "Jacobian"}
    assert len(loops) == 8
    part = loops[8, "double loop"]
    assert part["samples"] == 1 and part["whole_ms"] == pytest.approx(part["median_ms"] * 8)
    equal = [(row["equal"], row["name"]) for row in rows if row["measured"] == "comparison"]
    assert [one for one, _ in equal] == [False, True, True, True, True, False, False], equal
    selected = {row["name"].partition(":")[0]: row["result"] for row in rows if row["measured"] == "grad_outputs"}
    # z = (x1 x2, x2 + x3², x1) at (1, 2, 3) and (4, 5, 6)
    assert selected["one-hot at sample 0, output 1"] == [[0, 1, 6], [0, 0, 0]]
    assert selected["output 1 of all samples"] == [[0, 1, 6], [0, 1, 12]]
    assert selected["ones"] == [[2 + 0 + 1, 1 + 1, 6], [5 + 0 + 1, 4 + 1, 12]]
    devices = {row["name"]: row for row in rows if row["measured"] == "device"}
    assert set(devices) == {"cpu", "cuda", "mps"} and devices["cpu"]["median_ms"] > 0
    if not torch.cuda.is_available():
        assert devices["cuda"]["reason"] == "absent"


def test_the_chain_rule_by_hand_is_the_double_loop() -> None:
    net = input_jacobian._network(quick()).double()
    x, t = (one.double() for one in input_jacobian._inputs(quick(), 2, net.dim))
    hand = input_jacobian._chain_rule(net, x, t)
    torch.testing.assert_close(hand, input_jacobian._double_loop(net, x, t, 2), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(hand, input_jacobian._single_loop(net, x, t), rtol=1e-12, atol=1e-14)


def test_flow_likelihood(main: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def untrained(dataset: Any, scope: Scope) -> Any:
        torch.manual_seed(0)
        return flow_likelihood.ToyMLP(2, time_varying=True).requires_grad_(False)

    monkeypatch.setattr(flow_likelihood, "train", untrained)
    content = run(main, tmp_path, "flow-likelihood", "gaussian", "moons")
    assert content["max_error"] <= 1e-4
    [row] = [row for row in content["rows"] if row["measured"] == "density"]
    assert abs(row["integral"] - 1) <= 5e-3 and row["nats"] < row["true_nats"]
    assert abs(row["hutchinson_mean"]) <= 5 * row["hutchinson_error"] and row["evaluations"] == 80
    assert len(row["density"]) == 40 and len(row["paths"]) == 60
