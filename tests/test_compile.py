"""compile=True on the optimizer: the same steps, from whatever compiler there is."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from hessfree import HessianFree
from tests.test_optimizer import closure_for, flat, mlp, regression


def trajectory(**settings: Any) -> tuple[torch.Tensor, HessianFree]:
    """Take steps of which every third has a smaller batch, and carry the optimizer through a checkpoint."""
    model, (x, y) = mlp(), regression()
    saved: dict[str, Any] | None = None
    for _ in range(2):
        optimizer = HessianFree(model.parameters(), **settings)
        if saved is not None:
            optimizer.load_state_dict(saved)
        for i in range(3):
            rows = slice(30) if i == 2 else slice(40)
            optimizer.step(closure_for(optimizer, lambda rows=rows: F.mse_loss(model(x[rows]), y[rows])))
        saved = optimizer.state_dict()
    return flat(model.parameters()), optimizer


def test_steps_are_the_same_and_each_signature_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []

    def compiler(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        compiled.append(options)
        return lambda *tensors: function(*tensors)

    expected, _ = trajectory()
    monkeypatch.setattr(torch, "compile", compiler)
    found, optimizer = trajectory(compile=True)
    assert compiled == [{"dynamic": False}] * 12  # two optimizers, two signatures, three graphs
    assert (found - expected).norm() <= 1e-12 * expected.norm()
    for copied in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert copied.settings.compile
        assert torch.equal(flat(copied.param_groups[0]["params"]), found)


def test_without_a_compiler_one_warning_and_the_same_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    def compiler(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        raise RuntimeError("torch.compile is not supported here")

    expected, _ = trajectory()
    monkeypatch.setattr(torch, "compile", compiler)
    with pytest.warns(UserWarning) as said:
        found, _ = trajectory(compile=True)
    assert torch.equal(found, expected)
    assert [str(w.message).partition(". ")[0] for w in said] == [  # one for each of the two optimizers
        "compile=True is not used: RuntimeError: torch.compile is not supported here"
    ] * 2
