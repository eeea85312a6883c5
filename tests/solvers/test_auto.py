"""The choice of a solve form is a function of sizes, and what is chosen solves."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hessfree import CG, AutoSolver, DenseCholesky, GaussNewton, GramCholesky, HessianFree, Identity
from hessfree.operators import Work
from hessfree.rows import Counts
from tests.architectures import Attention, mlp, randn
from tests.networks import make
from tests.oracle import error
from tests.solvers.oracles import DenseOperator, symmetric


def perceptron(inner: int, width: int, outputs: int, samples: int) -> Work:
    """The work of three layers, as the operator counts it."""
    layers = ((inner, width), (width, width), (width, outputs))
    size = sum((i + 1) * o for i, o in layers)
    counts = Counts(samples * sum(i * o for i, o in layers), samples * (2 * width + outputs), 14, layers, 0, False)
    return Work(size, samples * outputs, samples, counts, rooted=True, graph=True)


def test_each_form_where_it_is_cheapest() -> None:
    auto = AutoSolver()
    assert isinstance(auto.choose(perceptron(2, 64, 2, 64)), GramCholesky)  # few rows
    assert isinstance(auto.choose(perceptron(2, 8, 1, 4000)), DenseCholesky)  # few parameters
    assert isinstance(auto.choose(perceptron(784, 512, 784, 256)), CG)  # many of both
    few = AutoSolver(cg=CG(max_iterations=2))
    assert isinstance(few.choose(perceptron(2, 64, 2, 256)), CG)


def test_forms_that_are_not_there_are_left_out() -> None:
    work, auto = perceptron(2, 64, 2, 64), AutoSolver(dense=DenseCholesky(max_parameters=10))
    assert set(auto.expected_seconds(work)) == {"cg", "gram"}
    assert set(AutoSolver().expected_seconds(dataclasses.replace(work, rooted=False))) == {"cg", "dense"}
    assert set(AutoSolver(gram=GramCholesky(max_rows=127)).expected_seconds(work)) == {"cg", "dense"}
    assert all(v == 2 * AutoSolver().expected_seconds(work)[k] for k, v in
               AutoSolver().expected_seconds(work, torch.float64).items())  # fmt: skip


def test_sizes_are_counted_from_the_graph() -> None:
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 2)).double()
    work = GaussNewton.from_loss(model, F.mse_loss, randn(6, 3), randn(6, 2), linearization="graph").work()
    assert (work.size, work.rows, work.samples, work.columns, work.rooted, work.graph) == (42, 12, 6, 2, True, True)
    assert work.counts.layers == ((3, 5), (5, 2)) and work.counts.whole == 10 and work.counts.by_row
    assert work.counts.forward == 6 * (15 + 10) and work.counts.activations == 6 * 7
    conv = nn.Sequential(nn.Conv2d(2, 3, (2, 3), stride=(1, 2), padding=1), nn.Flatten()).double()
    counts = GaussNewton.from_model(conv, randn(4, 2, 5, 6), linearization="graph").work().counts
    places = conv[0](randn(4, 2, 5, 6))[:, 0].numel()
    assert counts.forward == places * 3 * 12 and counts.activations == places * 3
    attention = GaussNewton.from_model(Attention().double(), randn(2, 3, 4), linearization="graph").work()
    assert attention.counts.layers == () and attention.counts.whole == attention.size
    for name in ("indefinite", "ranking"):
        p = make(name)
        assert not GaussNewton.from_loss(p.model, p.loss_fn, p.inputs, p.targets, linearization="graph").work().rooted


@pytest.mark.parametrize("samples", [3, 60])
def test_solves_in_the_form_that_was_chosen(samples: int) -> None:
    model = mlp(3, 12, 2)
    x, y = randn(samples, 3), randn(samples, 2, seed=3)
    operator = GaussNewton.from_loss(model, F.mse_loss, x, y, linearization="graph")
    auto, rhs = AutoSolver(cg=CG(max_iterations=500, tolerance=1e-12)), randn(operator.size, seed=4)
    solution = auto.solve(operator, rhs, 0.1)
    expected = torch.linalg.solve(operator.to_dense() + 0.1 * torch.eye(operator.size, dtype=rhs.dtype), rhs)
    assert error(solution.value, expected) <= 1e-8
    assert solution.memory["form"] == type(auto.choose(operator.work(), rhs.dtype)).__name__
    again = auto.solve(operator, rhs, 0.1, memory=solution.memory)
    assert torch.equal(again.value, solution.value)
    products_only = auto.solve(DenseOperator(symmetric(torch.linspace(1, 2, 5).double(), 1)), randn(5), 0.1)
    assert products_only.memory["form"] in {"CG", "DenseCholesky"}


def test_in_the_optimizer() -> None:
    torch.manual_seed(0)
    model, x = mlp(2, 8, 1), randn(20, 2)
    optimizer = HessianFree(model.parameters(), solver=AutoSolver(), preconditioner=Identity(), linearization="graph")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), x[:, :1].sin())
        loss.backward()
        return loss

    losses = [float(optimizer.step(closure)) for _ in range(6)]
    assert losses[-1] < 0.1 * losses[0]
    assert optimizer.last_step is not None and optimizer.last_step.solver_status == "solved directly"


@pytest.mark.parametrize(("name", "value"), [("cg", DenseCholesky()), ("dense", CG()), ("gram", None)])
def test_settings_of_another_kind(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name}=.* must be a "):
        AutoSolver(**{name: value})
