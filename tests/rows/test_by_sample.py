"""Rows of the Jacobian from one backward pass, against one backward pass a row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hessfree.rows.by_sample as rows_module
from hessfree.preconditioners import Sample
from hessfree.rows import Leading, OutputGraph, sample_rows
from tests.preconditioners.oracles import sample_of
from tests.preconditioners.pinn import curvature_of, poisson

DOUBLE = torch.float64


class ByHand(nn.Module):
    """One weight as two factors, and as W rather than Wᵀ."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.layer(x).tanh() @ self.layer.weight)


class Left(nn.Module):
    """The weight stands on the left: rows are not samples."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        return (self.weight @ x.T).tanh().T


class Reversed(nn.Module):
    """The last sample goes through the layer first."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.flip(0)).flip(0)


class TokensFirst(nn.Module):
    """The layer sees positions before samples."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.transpose(0, 1).reshape(-1, 3)).tanh().reshape(5, -1, 4).sum(0)


def mean_square(z: Tensor) -> Tensor:
    return z.square().mean()


def plain(make: Callable[[], nn.Module], *shape: int) -> Sample:
    torch.manual_seed(0)
    return sample_of(make().double(), torch.randn(*shape, dtype=DOUBLE), mean_square)


def equation(together: bool) -> Sample:
    problem = poisson(2, 5, 5, 1, together=together)
    return curvature_of(problem.net, problem.closure)[1]


CASES: dict[str, tuple[Callable[[], Sample], set[int]]] = {  # and the parameters that need a pass a row
    "mlp": (lambda: plain(lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), 6, 3), set()),
    "tokens": (lambda: plain(lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), 6, 5, 3), set()),
    "no bias": (lambda: plain(lambda: nn.Linear(3, 4, bias=False), 6, 2, 3), set()),
    "by hand": (lambda: plain(ByHand, 6, 3), set()),
    "left": (lambda: plain(Left, 6, 3), {0}),
    "mixes samples": (lambda: plain(lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), 6, 3), {0, 1, 2, 3}),
    "reversed": (lambda: plain(Reversed, 6, 3), set()),
    "reversed, an odd number": (lambda: plain(Reversed, 7, 3), set()),
    "tokens first": (lambda: plain(TokensFirst, 6, 5, 3), set()),
    "dead units": (lambda: plain(lambda: nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 2)), 9, 3), set()),
    "convolution": (lambda: plain(lambda: nn.Conv1d(2, 3, 2), 6, 2, 5), {0, 1}),
    "two residuals": (lambda: equation(False), set()),
    "one residual of 28": (lambda: equation(True), set()),  # points are called in two batches
}


def leading(sample: Sample, count: int) -> list[Leading]:
    space, found = sample.hessian.space, []
    for k, shape in enumerate(space.shapes):
        columns = []
        for seed in range(2):
            u = torch.zeros(space.size, dtype=DOUBLE)
            generator = torch.Generator().manual_seed(seed)
            space.views(u)[k][:count] = torch.randn(shape, generator=generator, dtype=DOUBLE)[:count]
            columns.append(u)
        found.append(Leading((k,), shape[0], count, columns))
    return found


@pytest.mark.parametrize("name", CASES)
def test_rows_are_vector_jacobian_products(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, one_by_one = CASES[name]
    sample, asked = make(), []
    original = rows_module._rows_one_by_one

    def spy(graph: OutputGraph, indices: Any, *args: Any) -> dict[int, Tensor]:
        asked.extend(indices)
        return original(graph, indices, *args)

    monkeypatch.setattr(rows_module, "_rows_one_by_one", spy)
    monkeypatch.setattr(rows_module, "CHUNK", 3)
    params, space = sample.parameters.params, sample.hessian.space
    for k, group in enumerate(leading(sample, 4)):
        found = sample_rows(sample.graph, range(len(params)), group)
        for c, u in enumerate(group.columns):
            for n in range(4):
                row = torch.zeros_like(u)
                space.views(row)[k][n] = space.views(u)[k][n]
                for i, expected in enumerate(sample.graph.pull_back(params, row)):
                    expected = torch.zeros_like(params[i]) if expected is None else expected
                    error = (found[i][4 * c + n] - expected).norm()
                    assert error <= 1e-12 * (1 + expected.norm())
    assert set(asked) == one_by_one
