"""Every implementation that is installed is held against a dense matrix in float64, before and after a step."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from experiments.benchmark.products import workloads
from experiments.benchmark.products.implementations import FLOOR, GRADIENT, IMPLEMENTATIONS, OURS, UnsupportedError
from experiments.benchmark.products.workloads import Workload
from tests.experiments.benchmark.products.tiny import WORKLOADS, dense, make

PRODUCTS = [name for name, kind in IMPLEMENTATIONS.items() if kind.is_product]
REFUSED = {
    ("asdfghjkl", "transformer"): "each token",
    ("asdfghjkl", "normalised"): "statistics of the batch",
    ("layer-wise by hand", "convolutions"): "perceptrons",
    ("layer-wise by hand", "transformer"): "perceptrons",
    ("layer-wise by hand", "normalised"): "perceptrons",
    ("JAX, jvp + vjp", "normalised"): "not written in JAX",
    ("JAX, linearize once", "normalised"): "not written in JAX",
    ("JAX, double reverse", "normalised"): "not written in JAX",
}


def quietly(name: str, workload: Workload, v: Tensor, moves: int = 0) -> list[Tensor]:
    """Return products at the first parameters and after each move, as the benchmark takes them."""
    kind = IMPLEMENTATIONS[name]
    if not kind.is_installed():
        pytest.skip(f"{kind.requirement} is not installed")
    with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH):
        warnings.simplefilter("ignore")  # what libraries say of their own code
        one = kind(workload)
        found = [one.decode(one.start(one.encode(v))).clone()]
        for _ in range(moves):
            workload.move(torch.Generator().manual_seed(1))
            one.refresh()
            one.setup()
            found.append(one.decode(one.product(one.encode(v))).clone())
    return found


@pytest.mark.parametrize("network", WORKLOADS)
@pytest.mark.parametrize("name", PRODUCTS)
def test_equals_the_dense_matrix(name: str, network: str) -> None:
    workload = make(network)
    v = workload.vector(torch.Generator().manual_seed(0))
    before = dense(workload)
    reason = REFUSED.get((name, network))
    if reason is not None:
        with pytest.raises(UnsupportedError, match=reason):
            quietly(name, workload, v)
        return
    found = quietly(name, workload, v, moves=1)
    for product, matrix in zip(found, (before, dense(workload)), strict=True):
        wanted = matrix @ v.double()
        error = float((product.double() - wanted).norm() / wanted.norm())
        assert error <= 2e-5
    assert float((found[1] - found[0]).norm() / found[0].norm()) >= 1e-4  # the move is seen


def test_the_gradient_is_one() -> None:
    workload = make("toy")
    [found] = quietly(GRADIENT, workload, torch.zeros(workload.size))
    workload.loss(workload.model(workload.inputs), workload.targets).backward()
    assert torch.equal(found, torch.cat([p.grad.reshape(-1) for p in workload.parameters]))


def test_the_floor_does_the_matrix_products_of_the_layers() -> None:
    workload = make("toy")
    v = workload.vector(torch.Generator().manual_seed(0))
    [floor] = quietly(FLOOR, workload, v)
    layers = [part for part in workload.model.net if isinstance(part, nn.Linear)]
    pieces = workload.split(v)[::2]
    inputs, tangent = [workload.inputs], torch.zeros_like(workload.inputs)
    with torch.no_grad():
        for layer, piece in zip(layers, pieces, strict=True):
            tangent = inputs[-1] @ piece.T + tangent @ layer.weight.T
            inputs.append(torch.selu(layer(inputs[-1])))
        wanted = []
        for layer, x in zip(reversed(layers), reversed(inputs[:-1]), strict=True):
            wanted = [tangent.T @ x, torch.zeros(len(layer.bias)), *wanted]
            tangent = tangent @ layer.weight
    for found, true in zip(workload.split(floor), wanted, strict=True):
        assert torch.allclose(found, true, rtol=1e-4, atol=1e-6)


def test_a_perceptron_of_many_outputs_is_too_much_for_single_samples() -> None:
    kind = IMPLEMENTATIONS["asdfghjkl"]
    if not kind.is_installed():
        pytest.skip("asdfghjkl is not installed")
    with pytest.raises(UnsupportedError, match="784 backward passes"):
        kind(workloads.make("toy784", small=True))


def test_says_which_back_end_came() -> None:
    one = IMPLEMENTATIONS[OURS](make("toy"))
    assert not one.detail
    one.setup()
    assert one.detail in {"traced", "graph"}


@pytest.mark.parametrize("name", workloads.NAMES)
def test_workloads_are_the_same_every_time(name: str) -> None:
    if name == "resnet18":
        pytest.importorskip("torchvision")
    state = torch.get_rng_state()
    first, second = (workloads.make(name, small=True) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters, second.parameters, strict=True))
    assert torch.equal(first.inputs, second.inputs) and torch.equal(first.targets, second.targets)
    assert first.double().parameters[0].dtype == torch.float64


@pytest.mark.parametrize("loss", [nn.L1Loss(), nn.MSELoss(reduction="sum")])
def test_other_losses_are_refused(loss: nn.Module) -> None:
    good = make("toy")
    with pytest.raises(ValueError, match="pass nn.MSELoss"):
        Workload("bad", "bad", good.model, loss, good.inputs, good.targets)


def test_frozen_parameters_are_refused() -> None:
    good = make("toy")
    good.parameters[0].requires_grad_(False)
    with pytest.raises(ValueError, match=r"net\.0\.weight does not require grad"):
        Workload("bad", "bad", good.model, good.loss, good.inputs, good.targets)
