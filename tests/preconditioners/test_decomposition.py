"""A factor that LAPACK cannot decompose, in single and then double precision: nothing is lost, training goes on."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hessfree import KFAC, HessianFree, Woodbury
from hessfree.preconditioners import Preconditioner
from tests.test_optimizer import closure_for, flat, mlp, regression

REAL = torch.linalg.eigh


class Failing:
    """Stands for torch.linalg.eigh, and fails on matrices of a size as long as it is told to."""

    def __init__(self, size: int, precisions: set[torch.dtype]) -> None:
        self.size = size
        self.precisions = precisions

    def __call__(self, matrix: Tensor, *args: Any) -> Any:
        if matrix.shape[-1] == self.size and matrix.dtype in self.precisions:
            raise torch.linalg.LinAlgError("linalg.eigh: the algorithm failed to converge")
        return REAL(matrix, *args)


def step_with(preconditioner: Preconditioner, dtype: torch.dtype = torch.float32) -> tuple[Any, HessianFree, Any]:
    model, (x, y) = mlp(dtype), regression(dtype=dtype)
    optimizer = HessianFree(model.parameters(), preconditioner=preconditioner)
    return model, optimizer, closure_for(optimizer, lambda: F.mse_loss(model(x), y))


def widest_input(model: Any) -> int:
    return max(p.shape[1] for p in model.parameters() if p.ndim == 2) + 1  # with the column of the bias


def test_double_precision_serves_where_single_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer, closure = step_with(KFAC())
    closure_before = flat(model.parameters()).clone()
    monkeypatch.setattr(torch.linalg, "eigh", Failing(widest_input(model), {torch.float32}))
    optimizer.step(closure)
    failed = flat(model.parameters())
    other, plain, closure = step_with(KFAC())
    monkeypatch.setattr(torch.linalg, "eigh", REAL)
    plain.step(closure)
    moved = (flat(other.parameters()) - closure_before).norm()
    assert float(moved) > 0
    assert float((failed - flat(other.parameters())).norm() / moved) <= 1e-3


@pytest.mark.parametrize("at_first", [True, False])
def test_a_factor_without_eigenform_leaves_what_was_known(at_first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer, closure = step_with(KFAC(update_every=1))
    if not at_first:
        optimizer.step(closure)
    known = optimizer.state_dict()["state"].get("hessfree", {}).get("preconditioner", {})
    failing = Failing(widest_input(model), {torch.float32, torch.float64})
    monkeypatch.setattr(torch.linalg, "eigh", failing)
    before = flat(model.parameters()).clone()
    with pytest.warns(UserWarning, match="a factor of K-FAC has no eigenform"):
        loss = optimizer.step(closure)
    report = optimizer.last_step
    assert report is not None
    assert report.accepted and not torch.equal(flat(model.parameters()), before)
    after = optimizer.state_dict()["state"]["hessfree"]["preconditioner"]
    assert after.get("updates", 0) == known.get("updates", 0)
    failing.precisions = set()  # the next batch's factors are sound again
    for _ in range(3):
        last = optimizer.step(closure)
    assert optimizer.state_dict()["state"]["hessfree"]["preconditioner"]["updates"] == known.get("updates", 0) + 3
    assert float(last) < float(loss)


def test_woodbury_keeps_what_it_had_too(monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer, closure = step_with(Woodbury(update_every=1, samples=8))
    optimizer.step(closure)
    known = optimizer.state_dict()["state"]["hessfree"]["preconditioner"]
    monkeypatch.setattr(torch.linalg, "eigh", Failing(widest_input(model), {torch.float32, torch.float64}))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        optimizer.step(closure)
    assert any("has no eigenform" in str(w.message) for w in seen)
    after = optimizer.state_dict()["state"]["hessfree"]["preconditioner"]
    assert after["kfac"]["updates"] == known["kfac"]["updates"]
    assert bool(torch.isfinite(flat(model.parameters())).all())
