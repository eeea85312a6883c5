"""K-FAC's exact factors against their definition, dense Gauss-Newton matrices and another package."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hessfree import KFAC
from tests.preconditioners.kfac_cases import DOUBLE, LOSSES, MODELS, by_hand, close, learn, mean_square, mlp, randn
from tests.preconditioners.oracles import Loss, block_places, dense, exact_factors, full, gauss_newton, sample_of


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


class Calls(nn.Module):
    """One network called twice, both of whose outputs are z."""

    def __init__(self, rollout: bool) -> None:
        super().__init__()
        self.rollout, self.net = rollout, mlp(3, 4, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        first = self.net(x)
        return first, self.net(first if self.rollout else x.flip(0)[:4] + 1)  # four rows


def of_both(loss: Loss) -> Loss:
    return lambda z: loss(torch.cat(z))


TWICE = [(rollout, loss, 4) for rollout in (True, False) for loss in LOSSES]
TWICE += [(False, "mean square", 6), (False, "cross-entropy", 6)]


@pytest.mark.parametrize(("rollout", "loss", "rows"), TWICE)
def test_exact_factors_of_a_network_called_twice(rollout: bool, loss: str, rows: int) -> None:
    """What the first call returned is a part of z; in a rollout it is the second call's input as well."""
    model, x, loss_fn = Calls(rollout), randn(rows, 3, seed=3), of_both(LOSSES[loss])
    sample = sample_of(model, x, loss_fn)
    expected = exact_factors(model, x, loss_fn)
    blocks = learn(sample)["blocks"]
    assert len(blocks) == 2
    for block in blocks:
        factors = expected[id(sample.parameters.params[block["weight"]])]
        close(block["inner"], factors.inner)
        close(full(block["outer"]), factors.outer)


@pytest.mark.parametrize("rows", [4, 6])
def test_the_last_layer_takes_no_sample_where_its_calls_are_independent(rows: int) -> None:
    model, x = Calls(False), randn(rows, 3, seed=3)
    sample, expected = sample_of(model, x, of_both(mean_square)), exact_factors(model, x, of_both(mean_square))
    last = learn(sample, KFAC())["blocks"][1]
    close(last["inner"], expected[id(model.net[2].weight)].inner)
    close(full(last["outer"]), expected[id(model.net[2].weight)].outer)
    assert learn(sample_of(Calls(True), x, of_both(mean_square)), KFAC())["blocks"][1]["outer"].ndim == 2


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
