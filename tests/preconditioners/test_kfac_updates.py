"""How K-FAC's state goes from update to update: averages, layers that rest, numbers that are not finite."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from hessfree import KFAC, HessianFree, LevenbergMarquardt
from tests.preconditioners.kfac_cases import (
    DOUBLE,
    EXACT,
    bits,
    by_hand,
    close,
    learn,
    mean_square,
    mixed_state,
    mlp,
    randn,
)
from tests.preconditioners.oracles import full, sample_of


def test_factors_are_averaged_plainly_at_first_and_then_exponentially() -> None:
    model = mlp(3, 4, 2)
    samples = [sample_of(model, randn(5, 3, seed=20 + k), by_hand) for k in range(6)]
    alone = [learn(sample) for sample in samples]
    for decay, weights in ((0.75, [1, 1, 1, 1, 4 / 3, 16 / 9]), (0.0, [0, 0, 0, 0, 0, 1])):
        preconditioner, state = KFAC(factors="exact", decay=decay), {}
        for k, sample in enumerate(samples):
            state, _ = preconditioner.update(state, sample, 10 + k)
        assert (state["updates"], state["step"]) == (6, 15)
        share = torch.tensor(weights, dtype=DOUBLE) / sum(weights)
        for i, block in enumerate(state["blocks"]):
            for name in ("inner", "outer"):
                expected = sum(w * full(s["blocks"][i][name]) for w, s in zip(share, alone, strict=True))
                close(block[name], expected)
            basis, other = block["outer_basis"], block["inner_basis"]
            both, matrix = torch.kron(basis, other), torch.kron(full(block["outer"]), block["inner"])
            values = both.T @ matrix @ both
            close(values, torch.diag(block["spectrum"].reshape(-1)))


class Aside(nn.Module):
    """A layer whose result is thrown away, and one that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.lost, self.idle = (nn.Linear(3, 3, dtype=DOUBLE) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        self.lost(x)
        with torch.no_grad():
            self.idle(x)
        return self.layer(x)


def test_layers_off_the_path_to_the_outputs() -> None:
    torch.manual_seed(0)
    model = Aside()
    sample = sample_of(model, randn(4, 3), mean_square)
    state = learn(sample)
    weights = [model.lost.weight, model.layer.weight]  # in the order of the calls
    assert [b["weight"] for b in state["blocks"]] == [sample.parameters.index_of(w) for w in weights]
    assert torch.equal(full(state["blocks"][0]["outer"]), torch.zeros(3, 3, dtype=DOUBLE))
    assert set(state["diagonal"]) == {4, 5} and not any(bool(d.any()) for d in state["diagonal"].values())
    for shift in (0.0, 0.1):
        apply = EXACT.inverse(state, sample.parameters, 1.0, [shift] * 6)
        assert bool(torch.isfinite(apply(randn(sample.parameters.size))).all())


class Skipping(nn.Module):
    """A layer that rests in some batches."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3, dtype=DOUBLE), nn.Linear(3, 3, dtype=DOUBLE)
        self.rests = False

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) if self.rests else self.second(self.first(x))


def test_a_layer_that_rests_keeps_its_factors() -> None:
    torch.manual_seed(0)
    model, x = Skipping(), randn(4, 3)
    state = learn(sample_of(model, x, mean_square))
    model.rests = True
    later, _ = EXACT.update(state, sample_of(model, x, mean_square), 2)
    by_weight = {b["weight"]: b for b in later["blocks"]}
    assert set(by_weight) == {0, 2} and later["diagonal"] == {}
    assert bits(by_weight[2]) == bits(state["blocks"][1])
    assert bits(by_weight[0]) != bits(state["blocks"][0])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_numbers_that_are_not_finite_are_not_learned(bad: float) -> None:
    sample, state, model, x = mixed_state()
    x = x.clone()
    x[2, 1] = bad
    spoiled = sample_of(model, x, lambda z: mean_square(z[:2]) + mean_square(z))
    for before in (state, {}):
        after, warning = KFAC().update(before, spoiled, 9)
        assert after == before if before == {} else after is before
        assert warning is not None and "not finite" in warning


@pytest.mark.parametrize("wide", [3, 512])
def test_what_a_bad_step_learned_is_dropped_and_what_was_known_is_as_it_was(wide: int) -> None:
    """Every step learns, and averages into factors of its own: one that is rejected, and one that fails, too."""
    model, x = mlp(7, 8, 2), randn(12, 7)
    optimizer = HessianFree(
        model.parameters(),
        preconditioner=KFAC(update_every=1, wide=wide, rank=2),
        damping_rule=LevenbergMarquardt(every=1),
    )
    calls: list[int] = []

    def closure(fails: bool = False) -> Tensor:
        calls.append(1)
        if fails and len(calls) == 2:
            raise KeyError("during the evaluation at the trial parameters")
        optimizer.zero_grad()
        loss = mean_square(model(x))
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)
    state = optimizer.state["hessfree"]["preconditioner"]
    known, parameters = bits(state), [p.clone() for p in model.parameters()]
    calls.clear()
    with pytest.raises(KeyError, match="trial parameters"):
        optimizer.step(lambda: closure(fails=True))
    assert optimizer.state["hessfree"]["preconditioner"] is state and bits(state) == known
    optimizer.param_groups[0]["lr"] = 1e4
    optimizer.step(closure)
    assert optimizer.last_step is not None and "rejected: the loss rose" in optimizer.last_step.status
    assert optimizer.state["hessfree"]["preconditioner"] is state and bits(state) == known
    assert all(map(torch.equal, model.parameters(), parameters))
    optimizer.param_groups[0]["lr"] = 1.0
    optimizer.step(closure)
    assert optimizer.last_step.accepted
    after = optimizer.state["hessfree"]["preconditioner"]
    assert after["updates"] == state["updates"] + 1 and bits(state) == known
