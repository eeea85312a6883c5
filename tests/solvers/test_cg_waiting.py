"""On an accelerator the host looks once, at the end, and that changes no bit of what it finds."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from hessfree.solvers import CG, Solution
from tests.solvers.oracles import SIZE, SPECTRA, DenseOperator, jacobi, symmetric, vector


class Reads(TorchFunctionMode):
    """Notes every moment at which the host asks a tensor for its numbers."""

    names = ("tolist", "item", "__bool__", "__float__", "__int__", "cpu", "numpy", "__index__", "__len__", "__array__")

    def __init__(self, events: list[str]) -> None:
        super().__init__()
        self.events = events

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in self.names:
            self.events.append("read")
        return func(*args, **(kwargs or {}))


def solve_without_waiting(
    patch: pytest.MonkeyPatch, solver: CG, *args: Any, events: list[str] | None = None, **kwargs: Any
) -> Solution:
    """Solve as on an accelerator, where the host looks only at the end."""
    with patch.context() as context:
        context.setattr(CG, "_waits", lambda self, rhs: False)
        with Reads([] if events is None else events):
            return solver.solve(*args, **kwargs)


def test_an_accelerator_is_waited_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []

    def note(count: int, product: Tensor) -> Tensor:
        events.append("product")
        return product

    matrix, rhs = symmetric(SPECTRA["decades"], seed=30), vector(SIZE, seed=31)
    solver = CG(max_iterations=6)
    args = (DenseOperator(matrix, note), rhs, 0.1, jacobi(matrix, 0.1))
    solve_without_waiting(monkeypatch, solver, *args, events=events)
    assert events == ["product"] * 6 + ["read"]
    meta = torch.empty(3, device="meta")
    assert not solver._waits(meta) and solver._waits(rhs)
    assert CG(max_iterations=6, tolerance=0.1)._waits(meta) and CG(max_iterations=20)._waits(meta)


def spoil_third(count: int, product: Tensor) -> Tensor:
    return product * (math.nan if count == 3 else 1.0)


CASES: dict[str, tuple[Tensor, Any, float]] = {
    "plain": (symmetric(SPECTRA["decades"], seed=32), None, 1.0),
    "zero": (symmetric(SPECTRA["decades"], seed=32), None, 0.0),
    "exact": (torch.eye(SIZE, dtype=torch.float64), None, 1.0),
    "negative": (symmetric(-SPECTRA["even"], seed=33), None, 1.0),
    "negative later": (symmetric(SPECTRA["decades"] - 0.1, seed=34), None, 1.0),
    "not finite": (symmetric(SPECTRA["decades"], seed=32), spoil_third, 1.0),
}


@pytest.mark.parametrize("name", CASES)
def test_both_ways_of_monitoring_give_the_same_bits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix, change, factor = CASES[name]
    solver, rhs = CG(max_iterations=10), factor * vector(SIZE, seed=35)
    for precondition in (None, lambda r: 0.3 * r):
        waited = solver.solve(DenseOperator(matrix, change), rhs, 0.0, precondition)
        blind = solve_without_waiting(monkeypatch, solver, DenseOperator(matrix, change), rhs, 0.0, precondition)
        assert torch.equal(waited.value, blind.value) and torch.equal(waited.residual, blind.residual)
        assert (waited.status, waited.iterations, waited.residuals) == (blind.status, blind.iterations, blind.residuals)
