"""Micro-batches: outputs of calls that share no samples, in what a preconditioner is shown and in what it learns."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hessfree import KFAC, EmpiricalFisherDiagonal
from hessfree.curvature import Curvature
from hessfree.preconditioners import Sample, Woodbury
from tests.oracle import error
from tests.preconditioners.kfac_cases import DOUBLE, EXACT, close, learn, mlp, randn
from tests.preconditioners.oracles import full
from tests.preconditioners.pinn import curvature_of

SIZES = {"equal": (4, 4, 4), "unequal": (5, 3, 2)}
Part = Callable[[Tensor, Tensor], Tensor]


def micro_batches(sizes: Sequence[int], width: int = 3) -> list[tuple[Tensor, Tensor]]:
    return [(randn(n, 3, seed=i), (torch.arange(n) + i) % width) for i, n in enumerate(sizes)]


def weighted(z: Tensor, y: Tensor) -> Tensor:
    """Of all samples the same share of a mean over ten."""
    return F.cross_entropy(z, y, reduction="sum") / 10


def coupled(z: Tensor, y: Tensor) -> Tensor:
    """A loss that no sample of a batch has to itself."""
    return (z.mean(0) ** 2).sum() + (z.flatten() @ z.flatten().roll(1)) ** 2 + weighted(z, y)


def of(
    net: nn.Module, batches: Sequence[tuple[Tensor, Tensor]], loss: Part = weighted, shift: float = 0.0
) -> tuple[Curvature, Sample]:
    """A closure calls the network and backward once for each micro-batch, as a Trainer's does."""

    def closure() -> Tensor:
        net.zero_grad()
        losses = []
        for x, y in batches:
            losses.append(loss(net(x), y))
            losses[-1].backward()
        return torch.stack(losses).sum()

    return curvature_of(net, closure, shift=shift)


def dense(net: nn.Module, batches: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """JᵀHJ `[P, P]` of the mean cross-entropy, from one batch of all samples."""
    x, y = (torch.cat(t) for t in zip(*batches, strict=True))
    z = net(x)
    rows = [torch.autograd.grad(t, list(net.parameters()), retain_graph=True) for t in z.reshape(-1)]
    jacobian = torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in rows])
    hessian = torch.autograd.functional.hessian(lambda t: weighted(t.view(z.shape), y), z.detach().reshape(-1))
    return jacobian.T @ hessian @ jacobian


@pytest.mark.parametrize("width", [3, 70])
@pytest.mark.parametrize("name", SIZES)
def test_products_and_roots_are_those_of_one_batch(name: str, width: int) -> None:
    net, batches = mlp(3, 2, width), micro_batches(SIZES[name], width)
    curvature, _ = of(net, batches)
    operator, true = curvature.operator, dense(net, batches)
    v = randn(len(true), seed=9)
    assert operator.output_hessian.closed.words == f"softmax over {width}"  # type: ignore[attr-defined]
    assert error(operator @ v, true @ v) <= 1e-12
    root = operator.low_rank().root  # type: ignore[attr-defined]
    assert error(root.rmatvec(root.matvec(v)), true @ v) <= 1e-12
    if width == 3:
        assert error(operator.to_dense(), true) <= 1e-12
        assert error(operator.diagonal(), true.diagonal()) <= 1e-12


@pytest.mark.parametrize("name", SIZES)
def test_exact_factors_are_those_of_one_batch(name: str) -> None:
    net, batches = mlp(3, 4, 3), micro_batches(SIZES[name])
    one = [(torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches]))]
    apart, whole = learn(of(net, batches)[1]), learn(of(net, one)[1])
    assert len(apart["blocks"]) == 2
    for found, expected in zip(apart["blocks"], whole["blocks"], strict=True):
        close(found["inner"], expected["inner"])
        close(full(found["outer"]), full(expected["outer"]))
    # a draw of random signs is a draw for the same outputs in the same order
    apart, whole = learn(of(net, batches)[1], KFAC()), learn(of(net, one)[1], KFAC())
    for found, expected in zip(apart["blocks"], whole["blocks"], strict=True):
        close(full(found["outer"]), full(expected["outer"]))


def test_woodbury_of_all_samples_of_unequal_micro_batches_is_the_exact_damped_inverse() -> None:
    net, batches = mlp(3, 2, 3), micro_batches(SIZES["unequal"])
    matrix = dense(net, batches)
    sample = of(net, batches, shift=0.1)[1]
    woodbury = Woodbury(samples=None, damping_scale=1.0)
    state, warning = woodbury.update({}, sample, 1)
    assert warning is None and woodbury.describe(state) == "Woodbury: 30 rows of the Jacobian (all samples)"
    apply = woodbury.inverse(state, sample.parameters, 1.0, [0.1] * 4)
    assert apply is not None
    b = randn(len(matrix), seed=8)
    expected = torch.linalg.solve(matrix + 0.1 * torch.eye(len(matrix), dtype=DOUBLE), b)
    assert error(apply(b), expected) <= 1e-9


def closures(net: nn.Module, how: str) -> Callable[[], Tensor]:
    a, b, y = randn(4, 3, seed=1), randn(4, 3, seed=2), torch.arange(4) % 3

    def loss() -> Tensor:
        first = net(a)
        if how == "rollout":
            return weighted(first, y) + weighted(net(first), y)
        if how == "compared":
            return weighted(first, y) + (first - net(b)).square().sum(1).square().mean()
        if how == "the same samples":
            return weighted(first, y) + weighted(net(a), y)
        return weighted(first, y) + weighted(net(b), y)

    def closure() -> Tensor:
        net.zero_grad()
        value = loss()
        value.backward()
        return value

    return closure


@pytest.mark.parametrize("how", ["apart", "rollout", "compared", "the same samples"])
def test_which_calls_share_no_samples(how: str) -> None:
    sample = curvature_of(net := mlp(3, 4, 3), closures(net, how))[1]
    assert sample.batches == ((0, 1) if how == "apart" else ())
    assert sample.mean_over == (8 if how == "apart" else 4)


def test_calls_of_a_model_of_its_own_are_one_batch() -> None:
    """Two heads, say: row n of every output is of sample n."""

    class TwoHeads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = mlp(3, 3), mlp(3, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.a(x), self.b(x)

    net, x, y = TwoHeads(), randn(5, 3), torch.arange(5) % 2

    def closure() -> Tensor:
        net.zero_grad()
        a, b = net(x)
        loss = weighted(a, y) + weighted(b, y)
        loss.backward()
        return loss

    sample = curvature_of(net, closure)[1]
    assert sample.batches == () and sample.mean_over == sample.samples == 5
    assert sample.hessian.form is not None and sample.hessian.form.words == "softmax over 3 + softmax over 2"


@pytest.mark.parametrize("name", SIZES)
def test_the_empirical_fisher_diagonal_of_micro_batches(name: str) -> None:
    """N Σ_n g_n², with g_n what sample n gives to the gradient of a mean over N of all micro-batches."""
    net, batches = mlp(3, 4, 3), micro_batches(SIZES[name])
    sample, count = of(net, batches)[1], sum(SIZES[name])
    expected = torch.zeros(sample.parameters.size, dtype=DOUBLE)
    for x, y in batches:
        for n in range(len(y)):
            found = torch.autograd.grad(weighted(net(x[n : n + 1]), y[n : n + 1]), list(net.parameters()))
            expected += count * torch.cat([g.reshape(-1) for g in found]).square()
    learn_it = EmpiricalFisherDiagonal().update
    draws = [learn_it({}, dataclasses.replace(sample, seed=i), 1)[0]["diagonal"] for i in range(1000)]
    stacked = torch.stack(draws)
    deviation, spread = stacked.mean(0) - expected, stacked.std(0) / math.sqrt(len(draws))
    assert bool((deviation.abs() <= 5 * spread + 1e-12).all())
    assert float(deviation.norm()) <= 0.2 * float(expected.norm())


@pytest.mark.parametrize("name", SIZES)
def test_kfac_of_a_loss_without_structure_has_the_scale_of_all_micro_batches(name: str) -> None:
    net, batches = mlp(3, 4, 3), micro_batches(SIZES[name])
    sample = of(net, batches, coupled)[1]
    assert sample.hessian.form is None and sample.batches == (0, 1, 2)
    for preconditioner in (KFAC(), EXACT):
        state, warning = preconditioner.update({}, sample, 1)
        assert warning is not None and "empirical Fisher" in warning
        outer = torch.zeros(3, 3, dtype=DOUBLE)
        for x, y in batches:
            z = net(x).detach().requires_grad_()
            (g,) = torch.autograd.grad(coupled(z, y), z)
            outer += sum(SIZES[name]) * g.T @ g
        close(full(state["blocks"][1]["outer"]), outer)
