"""What K-FAC draws: right on average, from the seed alone, and the loss's own gradients where H has no root."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hessfree import KFAC
from hessfree.preconditioners import Sample
from tests.preconditioners.kfac_cases import (
    DOUBLE,
    EXACT,
    LOSSES,
    MODELS,
    Scaled,
    bits,
    close,
    learn,
    mean_square,
    mixed_state,
    mlp,
    randn,
)
from tests.preconditioners.oracles import exact_factors, full, gauss_newton, sample_of


def draw(sample: Sample, count: int, factors: str) -> list[dict[str, Any]]:
    preconditioner = KFAC(factors=factors)  # type: ignore[arg-type]
    return [learn(dataclasses.replace(sample, seed=seed), preconditioner) for seed in range(count)]


def test_without_a_batch_dimension_the_outputs_count_as_samples() -> None:
    model, x = mlp(3, 4, 5), randn(3, seed=1)
    sample = sample_of(model, x, mean_square)
    expected = exact_factors(model, x, mean_square)
    states = draw(sample, 300, "exact")
    for i, block in enumerate(states[0]["blocks"]):
        factors = expected[id(sample.parameters.params[block["weight"]])]
        unbiased([full(state["blocks"][i]["outer"]) for state in states], factors.outer)


def unbiased(draws: list[Tensor], expected: Tensor) -> None:
    """The mean of the draws is within five standard errors of what is expected, entry by entry."""
    stacked = torch.stack(draws)
    error = (stacked.mean(0) - expected).abs()
    assert bool((error <= 5 * stacked.std(0) / len(draws) ** 0.5 + 1e-12 * expected.abs().max()).all())
    assert float(error.norm()) <= 0.3 * float(expected.norm())


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", ["mlp", "leading dimensions", "called twice", "mixing"])
def test_sampled_factors_are_the_exact_ones_on_average(name: str, loss: str) -> None:
    torch.manual_seed(0)
    model, x = MODELS[name]()
    sample = sample_of(model, x, LOSSES[loss])
    expected = exact_factors(model, x, LOSSES[loss])
    states = draw(sample, 300, "sampled")
    for i, block in enumerate(states[0]["blocks"]):
        factors = expected[id(sample.parameters.params[block["weight"]])]
        unbiased([full(state["blocks"][i]["outer"]) for state in states], factors.outer)
        close(block["inner"], factors.inner)


@pytest.mark.parametrize("factors", ["sampled", "exact"])
@pytest.mark.parametrize("loss", LOSSES)
def test_the_diagonal_of_other_parameters_on_average(loss: str, factors: str) -> None:
    torch.manual_seed(0)
    model, x = Scaled(), randn(6, 3, seed=8)
    sample = sample_of(model, x, LOSSES[loss])
    expected = gauss_newton(model, x, LOSSES[loss]).diagonal()[:3]
    draws = [state["diagonal"][0] for state in draw(sample, 400, factors)]
    unbiased(draws, expected)


def coupled(z: Tensor) -> Tensor:
    """A loss that no sample has to itself."""
    return (z.mean(0) ** 2).sum() + (z.flatten() @ z.flatten().roll(1)) ** 2 + z.square().mean()


def test_the_empirical_fisher_where_the_loss_has_no_structure() -> None:
    model, x = mlp(3, 4, 2), randn(5, 3, seed=9)
    sample = sample_of(model, x, coupled)
    assert sample.hessian.form is None
    for preconditioner in (KFAC(), EXACT):
        state, warning = preconditioner.update({}, sample, 1)
        assert warning is not None and "empirical Fisher" in warning and "output gradients" in warning
        z = model(x)
        (g,) = torch.autograd.grad(coupled(z), z)
        s = (g @ model[2].weight) * (1 - model[1](model[0](x)) ** 2)  # at the output of the first layer
        close(full(state["blocks"][1]["outer"]), 5 * g.T @ g)
        close(full(state["blocks"][0]["outer"]), (5 * s.T @ s).detach())


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.a, self.b = (nn.Linear(3, n, dtype=DOUBLE) for n in (3, 2, 2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.layer(x)
        return self.a(h), self.b(h)


def test_the_empirical_fisher_keeps_the_outputs_of_a_sample_together() -> None:
    torch.manual_seed(0)
    model, x = TwoHeads(), randn(5, 3, seed=10)

    def loss(z: tuple[Tensor, Tensor]) -> Tensor:
        return coupled(torch.cat(z, 1))

    sample = sample_of(model, x, loss)  # type: ignore[arg-type]
    state, warning = KFAC().update({}, sample, 1)
    assert warning is not None
    h = model.layer(x).detach().requires_grad_()
    (s,) = torch.autograd.grad(loss((model.a(h), model.b(h))), h)
    close(full(state["blocks"][0]["outer"]), 5 * s.T @ s)


def test_the_same_seed_draws_the_same_factors() -> None:
    sample, _, _, _ = mixed_state()
    assert bits(learn(sample, KFAC())) == bits(learn(sample, KFAC()))
    assert bits(learn(sample, KFAC())) != bits(learn(dataclasses.replace(sample, seed=1), KFAC()))


def test_the_global_random_state_is_left_alone() -> None:
    sample, _, _, _ = mixed_state()
    before = torch.get_rng_state()
    learn(sample, KFAC())
    assert torch.equal(torch.get_rng_state(), before)
