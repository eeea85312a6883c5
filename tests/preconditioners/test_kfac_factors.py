"""K-FAC's factors against their definition, dense Gauss-Newton matrices and another package."""

from __future__ import annotations

import dataclasses
import math
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
    Scaled,
    bits,
    by_hand,
    close,
    learn,
    mean_square,
    mixed_state,
    mlp,
    randn,
)
from tests.preconditioners.oracles import block_places, dense, exact_factors, full, gauss_newton, sample_of


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 3), (1, 1, 1, 3)], ids=str)
def test_exact_factors_are_the_block_of_one_sample(shape: tuple[int, ...], bias: bool, loss: str) -> None:
    model, x = mlp(3, 4, 5, bias=bias), randn(*shape, seed=1)
    sample = sample_of(model, x, LOSSES[loss])
    state, expected = learn(sample), gauss_newton(model, x, LOSSES[loss])
    assert len(state["blocks"]) == 2 and state["diagonal"] == {}
    for block in state["blocks"]:
        assert (block["bias"] is not None) == bias
        places = block_places(block, sample.parameters)
        close(torch.kron(full(block["outer"]), block["inner"]), expected[places[:, None], places])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7, 3), (4, 2, 3)], ids=str)
def test_a_linear_net_under_mean_square_is_exact_for_any_number_of_samples(shape: tuple[int, ...], bias: bool) -> None:
    model, x = nn.Sequential(nn.Linear(3, 4, bias=bias, dtype=DOUBLE)), randn(*shape, seed=2)
    sample = sample_of(model, x, mean_square)
    close(dense(learn(sample), sample.parameters), gauss_newton(model, x, mean_square))


class Twice(nn.Module):
    """One layer called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.layer = nn.Linear(3, 4, dtype=DOUBLE), nn.Linear(4, 4, dtype=DOUBLE)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.tanh(self.layer(torch.tanh(self.first(x)))))


class Mixing(nn.Module):
    """Positions that look at each other."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 4, dtype=DOUBLE), nn.Linear(4, 3, dtype=DOUBLE)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.last((h @ h.mT).softmax(-1) @ h)


MODELS: dict[str, Any] = {
    "mlp": lambda: (mlp(3, 4, 4, 3), randn(6, 3, seed=3)),
    "no bias": lambda: (mlp(3, 4, 3, bias=False), randn(6, 3, seed=3)),
    "leading dimensions": lambda: (mlp(3, 4, 3), randn(4, 2, 3, seed=3)),
    "called twice": lambda: (Twice(), randn(5, 3, seed=3)),
    "mixing": lambda: (Mixing(), randn(3, 4, 3, seed=3)),
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", MODELS)
def test_exact_factors_of_many_rows(name: str, loss: str) -> None:
    torch.manual_seed(0)
    model, x = MODELS[name]()
    sample = sample_of(model, x, LOSSES[loss])
    expected = exact_factors(model, x, LOSSES[loss])
    blocks = learn(sample)["blocks"]
    assert len(blocks) == len(expected)
    for block in blocks:
        factors = expected[id(sample.parameters.params[block["weight"]])]
        close(block["inner"], factors.inner)
        close(full(block["outer"]), factors.outer)


def test_a_shared_bias_belongs_to_the_first_weight() -> None:
    model, x = mlp(3, 3, 3), randn(5, 3, seed=4)
    model[2].bias = model[0].bias
    sample = sample_of(model, x, by_hand)
    first, second = learn(sample)["blocks"]
    index = sample.parameters.index_of(model[0].bias)
    assert (first["bias"], second["bias"]) == (index, None)
    assert first["inner"].shape == (4, 4) and second["inner"].shape == (3, 3)
    expected = exact_factors(model, x, by_hand)
    close(first["inner"], expected[id(model[0].weight)].inner)
    close(second["inner"], expected[id(model[2].weight)].inner[:-1, :-1])
    close(full(second["outer"]), expected[id(model[2].weight)].outer)


def test_a_shared_weight_with_two_biases() -> None:
    model, x = mlp(3, 3, 3), randn(5, 3, seed=5)
    model[2].weight = model[0].weight
    sample = sample_of(model, x, by_hand)
    state = learn(sample)
    (block,) = state["blocks"]
    expected = exact_factors(model, x, by_hand)[id(model[0].weight)]
    close(full(block["outer"]), expected.outer)  # of both calls
    expected.rows[1][:, -1] = 0  # the second call does not use the first's bias
    close(block["inner"], expected.inner)
    assert set(state["diagonal"]) == {sample.parameters.index_of(model[2].bias)}


@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_a_frozen_half_of_a_layer(frozen: str) -> None:
    model, x = mlp(3, 4, 2), randn(1, 3, seed=6)
    getattr(model[0], frozen).requires_grad_(False)
    sample = sample_of(model, x, by_hand)
    state, expected = learn(sample), gauss_newton(model, x, by_hand)
    if frozen == "bias":
        block = state["blocks"][0]
        places = block_places(block, sample.parameters)
        assert block["bias"] is None and state["diagonal"] == {}
        close(torch.kron(full(block["outer"]), block["inner"]), expected[places[:, None], places])
    else:
        assert [b["weight"] for b in state["blocks"]] == [1] and set(state["diagonal"]) == {0}
        close(state["diagonal"][0], expected.diagonal()[:4])  # one sample: no sign matters


def test_input_by_keyword() -> None:
    layer = nn.Linear(3, 2, dtype=DOUBLE)
    sample = sample_of(layer, {"input": randn(1, 3)}, mean_square)
    (block,) = learn(sample)["blocks"]
    expected = gauss_newton(layer, randn(1, 3), mean_square)
    close(torch.kron(full(block["outer"]), block["inner"]).trace(), expected.trace())


class ByKeyword(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2, dtype=DOUBLE)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(input=x)


def test_a_layer_whose_input_was_not_recorded_has_the_diagonal_at_least() -> None:
    sample = sample_of(ByKeyword(), randn(1, 3), mean_square)
    state = learn(sample)
    assert [b["weight"] for b in state["blocks"]] == [0] or set(state["diagonal"]) == {0, 1}


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


def test_the_same_seed_draws_the_same_factors() -> None:
    sample, _, _, _ = mixed_state()
    assert bits(learn(sample, KFAC())) == bits(learn(sample, KFAC()))
    assert bits(learn(sample, KFAC())) != bits(learn(dataclasses.replace(sample, seed=1), KFAC()))


def test_the_global_random_state_is_left_alone() -> None:
    sample, _, _, _ = mixed_state()
    before = torch.get_rng_state()
    learn(sample, KFAC())
    assert torch.equal(torch.get_rng_state(), before)


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 4, 2, stride=2)
        self.last = nn.Linear(16, 3)
        self.to(DOUBLE)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.second(torch.tanh(self.first(x)))).flatten(1))


PEERS: dict[str, Any] = {
    "linear": lambda: (mlp(3, 4, 4, 3), randn(6, 3, seed=15)),
    "linear without bias": lambda: (mlp(3, 4, 4, 3, bias=False), randn(6, 3, seed=15)),
    "convolutions": lambda: (Convolutions(), randn(6, 2, 4, 4, seed=15)),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("loss", ["mean square", "cross-entropy"])
def test_equals_the_kfac_of_curvlinops(loss: str, name: str) -> None:
    curvlinops = pytest.importorskip("curvlinops")
    torch.manual_seed(0)
    model, x = PEERS[name]()
    target = torch.ones(6, 3, dtype=DOUBLE) if loss == "mean square" else torch.arange(6) % 3
    sample = sample_of(model, x, LOSSES[loss])
    theirs = curvlinops.KFACLinearOperator(
        model,
        nn.MSELoss() if loss == "mean square" else nn.CrossEntropyLoss(),
        [p for p in model.parameters() if p.requires_grad],
        [(x, target)],
        fisher_type="type-2",
        separate_weight_and_bias=False,
    )
    identity = torch.eye(sample.parameters.size, dtype=DOUBLE)
    close(dense(learn(sample), sample.parameters), torch.as_tensor(theirs @ identity), 1e-10)
