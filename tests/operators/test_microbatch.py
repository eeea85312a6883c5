"""Products summed over chunks of samples equal the whole batch's, or are refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hessfree import GaussNewton, MonteCarloFisher, mark_outputs
from hessfree.linearization import LinearizationError
from hessfree.linearization.traced import traces_of
from hessfree.linearization.traced.trace import Trace
from tests.architectures import classes, mlp, randn
from tests.networks import PROBLEMS, make
from tests.oracle import error, truth
from tests.problem import softplus_pairs

# those of which no part can be evaluated alone, and what is said of them
REFUSED = {
    "conv_batchnorm": "gives a sample other outputs in another part",
    "dropout": "gives a sample other outputs in another part",
    "checkpointed": "gives a sample other outputs in another part",  # it holds a dropout
    "nested_outputs": "gives a sample other outputs in another part",  # a variational autoencoder draws
    "logits_and_loss": re.escape("returned a tensor of shape ()"),
    "checkpointed_attention": re.escape("returned a tensor of shape (3, 2)"),
}
DIVIDED = [name for name in PROBLEMS if make(name).loss_fn is not None and name not in REFUSED]


def from_loss(name: str, **options: Any) -> GaussNewton:
    problem = make(name)
    return GaussNewton.from_loss(problem.model, problem.loss_fn, problem.inputs, problem.targets, **options)


@pytest.mark.parametrize("backend", ["auto", "graph"])
@pytest.mark.parametrize("microbatch", [1, 2, 100])
@pytest.mark.parametrize("name", DIVIDED)
def test_every_product_is_the_whole_batchs(name: str, microbatch: int, backend: str) -> None:
    true = truth(make(name)).gauss_newton
    operator = from_loss(name, microbatch=microbatch, linearization=backend)
    v = randn(operator.size, 3, seed=5)
    for _ in range(2):
        assert error(operator @ v, true @ v) <= 1e-10
    assert error(operator.quadratic_form(v.T), v.T @ true @ v) <= 1e-10
    assert error(operator.to_dense(), true) <= 1e-10
    assert error(operator.diagonal(), true.diagonal()) <= 1e-10


@pytest.mark.parametrize("name", REFUSED)
def test_a_network_that_has_no_parts_is_found_out(name: str) -> None:
    with pytest.raises((ValueError, LinearizationError), match=REFUSED[name]):
        from_loss(name, microbatch=1)


def test_in_eval_mode_it_has_parts() -> None:
    for name in ("conv_batchnorm", "dropout"):
        problem = make(name)
        problem.model.eval()
        true = truth(problem).gauss_newton
        operator = GaussNewton.from_loss(problem.model, problem.loss_fn, problem.inputs, problem.targets, microbatch=2)
        assert operator.linearization.name == "traced"
        v = randn(operator.size)
        assert error(operator @ v, true @ v) <= 1e-10


class Mixing(nn.Module):
    """Mixes samples in one of several ways."""

    def __init__(self, how: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.net, self.how = mlp(3, 4, 2), how

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) + 1e-2 * self.how(x)[:, :2]


@pytest.mark.parametrize("microbatch", [1, 3, 4])
@pytest.mark.parametrize(
    "how",
    [lambda x: x.flip(0), lambda x: x - x.mean(0), lambda x: x.roll(1, 0), lambda x: x.cumsum(0)],
    ids=["flip", "mean", "roll", "cumsum"],
)
def test_every_way_to_mix_samples_is_found_out(how: Callable[[Tensor], Tensor], microbatch: int) -> None:
    with pytest.raises(LinearizationError, match="call model.eval\\(\\), or use microbatch=None"):
        GaussNewton.from_loss(Mixing(how), F.mse_loss, randn(8, 3), randn(8, 2), microbatch=microbatch)


def test_the_mean_stays_that_of_all_samples() -> None:
    model, x, y = mlp(3, 4, 3), randn(9, 3), classes(9, high=3)
    y[[0, 1, 2, 4]] = -100  # the first chunk of three has no target at all
    weight = torch.tensor([0.2, 1.0, 5.0], dtype=torch.float64)

    def loss_fn(z: Tensor, t: Tensor) -> Tensor:
        return F.cross_entropy(z, t, weight, ignore_index=-100)

    true = GaussNewton.from_loss(model, loss_fn, x, y, linearization="graph").to_dense()
    operator = GaussNewton.from_loss(model, loss_fn, x, y, microbatch=3)
    assert operator.output_hessian.closed.words == "softmax over 3"
    v = randn(operator.size)
    assert error(operator @ v, true @ v) <= 1e-12
    fisher = MonteCarloFisher.from_loss(model, loss_fn, x, y, samples=2, seed=3, microbatch=3)
    whole = MonteCarloFisher.from_loss(model, loss_fn, x, y, samples=2, seed=3)
    assert error(fisher @ v, whole @ v) <= 1e-12


@pytest.mark.parametrize("microbatch", [3, None])
def test_a_product_evaluates_the_network_once_where_the_hessian_is_by_samples(
    microbatch: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x, y = mlp(3, 4, 1), randn(8, 3), randn(8, 1)
    evaluated: list[int] = []
    evaluate = Trace.evaluate

    def counting(self: Trace, network: Any, parameters: Any) -> Any:
        evaluated.append(len(network.inputs[0]))
        return evaluate(self, network, parameters)

    for loss_fn, passes in ((F.mse_loss, 1), (lambda z, t: softplus_pairs(z[:, 0], t[:, 0]), 2)):
        operator = GaussNewton.from_loss(model, loss_fn, x, y, microbatch=microbatch)
        v = randn(operator.size)
        operator @ v  # finds the form of H
        with monkeypatch.context() as patch:
            patch.setattr(Trace, "evaluate", counting)
            evaluated.clear()
            operator @ v
        assert evaluated == ([] if microbatch is None else [3, 3, 2] * passes)


def test_in_single_precision() -> None:
    torch.manual_seed(0)
    model, x, y = mlp(3, 40, 30).float(), torch.randn(600, 3), torch.randn(600, 30)
    for loss_fn, targets in ((F.mse_loss, y), (F.cross_entropy, y.argmax(1)), (F.smooth_l1_loss, y)):
        whole = GaussNewton.from_loss(model, loss_fn, x, targets)
        parts = GaussNewton.from_loss(model, loss_fn, x, targets, microbatch=128)
        assert parts.output_hessian.closed is not None
        v = torch.randn(whole.size)
        assert error(parts @ v, whole @ v) <= 1e-6


def test_a_last_smaller_chunk_is_traced_once_for_all_operators() -> None:
    model = mlp(3, 4, 2)
    for seed in range(3):
        operator = GaussNewton.from_loss(model, F.mse_loss, randn(8, 3, seed=seed), randn(8, 2), microbatch=3)
        operator @ randn(operator.size)
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.01)
    assert traces_of(model).misses == 2


def test_after_an_update_it_says_so() -> None:
    model, x, y = mlp(3, 4, 2), randn(8, 3), randn(8, 2)
    operator = GaussNewton.from_loss(model, F.mse_loss, x, y, microbatch=3)
    v = randn(operator.size)
    with torch.no_grad():
        model[0].weight[0, 0] += 1e-13
    with pytest.raises(LinearizationError, match="changed since .* build the operator anew"):
        operator @ v
    operator = GaussNewton.from_loss(model, F.mse_loss, x, y, microbatch=3)
    x[0] += 1
    with pytest.raises(LinearizationError, match="changed since"):
        operator @ v


def test_the_world_is_left_as_by_a_call() -> None:
    model, x, y = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double(), randn(8, 3), randn(8, 2)
    model.eval()
    state, buffers = torch.get_rng_state(), [b.clone() for b in model.buffers()]
    operator = GaussNewton.from_loss(model, F.mse_loss, x, y, microbatch=3)
    operator @ randn(operator.size)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(map(torch.equal, model.buffers(), buffers))
    assert all(p.grad is None for p in model.parameters())


def test_what_cannot_be_divided() -> None:
    model, x, y = mlp(3, 4, 2), randn(8, 3), randn(8, 2)
    for loss_fn, inputs, microbatch, match in (
        (F.mse_loss, x, 0, "microbatch=0"),
        (F.l1_loss, x, 3, "linear in what Sequential returned"),
        (lambda z, t: F.mse_loss(z, t) + model(x).square().mean(), x, 3, "loss_fn calls Sequential"),
        (lambda z, t: mark_outputs(z - t).square().mean(), x, 3, "loss_fn calls mark_outputs"),
        (lambda z, t: (z - t).square(), x, 3, "not a scalar"),
    ):
        with pytest.raises(ValueError, match=match):
            GaussNewton.from_loss(model, loss_fn, inputs, y, microbatch=microbatch)
