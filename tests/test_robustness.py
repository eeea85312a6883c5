"""Both presets under bad numbers: the step is rejected or shortened, nothing is lost, and the run recovers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hessfree import HessianFree

PRESETS = {"stochastic": HessianFree.stochastic, "full_batch": HessianFree.full_batch}
pytestmark = pytest.mark.parametrize("preset", PRESETS)


class Run:
    """A small network with buffers, its optimizer, and a loss that a test may spoil."""

    def __init__(self, preset: str, net: nn.Module | None = None, **changes: Any) -> None:
        torch.manual_seed(0)
        self.x = torch.randn(64, 3)
        self.y = torch.stack([self.x.sum(1).sin(), self.x[:, 0] * self.x[:, 1]], 1)
        self.net = net or nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 2))
        self.optimizer = PRESETS[preset](self.net.parameters(), **changes)

    def mean_square(self) -> Tensor:
        return F.mse_loss(self.net(self.x), self.y)

    def step(self, loss: Callable[[], Tensor] | None = None) -> None:
        def closure() -> Tensor:
            self.optimizer.zero_grad()
            value = (loss or self.mean_square)()
            value.backward()
            return value

        self.optimizer.step(closure)

    def steps(self, count: int) -> float:
        for _ in range(count):
            self.step()
        return float(self.optimizer.last_step.loss)

    def tensors(self) -> list[Tensor]:
        return [t.detach().clone() for t in self.net.state_dict().values()]

    def finite(self) -> bool:
        found: list[Tensor] = list(self.tensors())

        def collect(value: Any) -> None:
            if isinstance(value, Tensor):
                found.append(value)
            elif isinstance(value, dict):
                for v in value.values():
                    collect(v)
            elif isinstance(value, list | tuple):
                for v in value:
                    collect(v)

        collect(self.optimizer.state_dict())
        return all(bool(torch.isfinite(t).all()) for t in found if t.is_floating_point())

    def recovers(self, count: int = 15) -> None:
        """After the trouble the loss goes down again, and every number that is kept is finite."""
        before = float(self.mean_square().detach())
        assert self.steps(count) < before
        assert self.finite()


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(s, t) for s, t in zip(a, b, strict=True))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("when", [0, 6])
def test_numbers_in_the_batch_that_are_not_finite(preset: str, when: int, bad: float) -> None:
    run = Run(preset)
    for _ in range(when):
        run.step()
    before, damping = run.tensors(), run.optimizer.param_groups[0]["damping"]
    memory = run.optimizer.state.get("hessfree", {})
    learned = memory.get("preconditioner") if memory else None
    clean = run.x.clone()
    run.x[3, 1] = bad
    run.step()
    assert not run.optimizer.last_step.accepted and "rejected" in run.optimizer.last_step.status
    assert same(before, run.tensors())
    assert run.optimizer.param_groups[0]["damping"] >= damping
    if learned:
        assert run.optimizer.state["hessfree"]["preconditioner"] is learned
    run.x = clean
    run.recovers()


def test_singular_curvature(preset: str) -> None:
    """A dead input, a dead unit and a copied input: G has no inverse without damping."""
    run = Run(preset, nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)))
    run.x[:, 2] = 0
    run.x[:, 1] = run.x[:, 0]
    with torch.no_grad():
        run.net[2].weight[:, 0] = 0
        run.net[0].weight[0] = 0
    run.recovers()


def test_negative_curvature(preset: str) -> None:
    """A loss that is concave in the outputs here and there: H is clamped, or conjugate gradients stop."""
    run = Run(preset)

    def robust() -> Tensor:
        return (run.net(run.x) - run.y).square().log1p().mean()

    run.y = run.y + 5 * (torch.rand(run.y.shape) < 0.2)
    first = float(robust().detach())
    for _ in range(20):
        run.step(robust)
        assert bool(torch.isfinite(run.tensors()[0]).all())
    assert float(robust().detach()) < first and run.finite()


def test_no_damping(preset: str) -> None:
    run = Run(preset, damping=0.0)
    before = float(run.mean_square().detach())
    for _ in range(20):
        run.step()
        assert run.finite()
    assert float(run.mean_square().detach()) < before


def test_a_plateau(preset: str) -> None:
    """No gradient at all: no step, no division by zero; and on again when the data change."""
    run = Run(preset)
    run.steps(3)
    before = [p.detach().clone() for p in run.net.parameters()]
    for _ in range(3):
        run.step(lambda: 0 * run.net(run.x).square().mean())
        report = run.optimizer.last_step
        assert math.isfinite(report.loss) and math.isfinite(report.next_damping)
    assert run.finite()
    assert same(before, list(run.net.parameters()))
    run.recovers()


def test_a_loss_that_explodes_on_the_full_step(preset: str) -> None:
    """Far out the loss is infinite: some step is rejected or taken back, and the run goes on from where it was."""
    run = Run(preset, nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)), damping=1e-6)
    run.y = run.y * 300

    def walled() -> Tensor:
        z = run.net(run.x)
        return F.mse_loss(z, run.y) + torch.where(z.detach().abs() > 30, math.inf, 0.0).sum()

    first, bad, best = float(walled().detach()), 0, math.inf
    for _ in range(60):
        run.step(walled)
        bad += not run.optimizer.last_step.accepted
        now = float(walled().detach())
        best = min(best, now)
        assert run.finite()
    assert bad >= 1 and best < first


def test_a_factor_that_is_not_positive_definite_in_single_precision(preset: str) -> None:
    """Inputs of rank one and of size 1e4: rounding makes both factors indefinite by more than the damping."""
    run = Run(preset, nn.Sequential(nn.Linear(40, 30), nn.Tanh(), nn.Linear(30, 2)), damping=1e-8)
    run.x = torch.linspace(-1, 1, 64)[:, None] * 1e4 * torch.randn(40)
    run.y = torch.stack([run.x[:, 0].sign(), run.x[:, 1].abs() / 1e4], 1)
    run.recovers(25)
