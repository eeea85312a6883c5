"""What a product and a step hold at their peak, over one gradient: counted bytes, so the same on every machine."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from experiments.benchmark.memory import peak_bytes
from hessfree import CG, GaussNewton, HessianFree, Identity, LevenbergMarquardt, QuadraticModelMomentum
from hessfree.preconditioners import KFAC, Preconditioner


def perceptron() -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    model = nn.Sequential(nn.Linear(8, 64), nn.SELU(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 2))
    return model, nn.MSELoss(), torch.randn(2048, 8), torch.randn(2048, 2)


def images() -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    layers = [nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 5))
    return model, nn.CrossEntropyLoss(), torch.randn(32, 3, 32, 32), torch.randint(5, (32,))


def as_wide_as_its_input() -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    """Outputs are most of what a gradient holds."""
    model = nn.Sequential(nn.Linear(300, 16), nn.SELU(), nn.Linear(16, 300))
    return model, nn.MSELoss(), torch.randn(1024, 300), torch.randn(1024, 300)


MODELS = {"perceptron": perceptron, "images": images, "as wide as its input": as_wide_as_its_input}
Maker = Callable[[], tuple[nn.Module, nn.Module, Tensor, Tensor]]


def gradient_bytes(model: nn.Module, loss_fn: nn.Module, inputs: Tensor, targets: Tensor) -> int:
    model.zero_grad()
    peak = peak_bytes(lambda: loss_fn(model(inputs), targets).backward())
    model.zero_grad()
    return peak


@pytest.mark.parametrize("name", MODELS)
def test_a_product_holds_little_more_than_a_gradient(name: str) -> None:
    torch.manual_seed(0)
    model, loss_fn, inputs, targets = MODELS[name]()
    v = torch.randn(sum(p.numel() for p in model.parameters()))

    def product() -> tuple[GaussNewton, Tensor]:
        operator = GaussNewton.from_loss(model, loss_fn, inputs, targets)
        return operator, operator @ v

    product()  # traces
    ratio = peak_bytes(product) / gradient_bytes(model, loss_fn, inputs, targets)
    assert ratio <= (1.45 if name == "as wide as its input" else 1.3)


@pytest.mark.parametrize("preconditioner", [Identity(), KFAC()], ids=["no preconditioner", "K-FAC"])
@pytest.mark.parametrize("name", MODELS)
def test_a_step_holds_few_gradients(name: str, preconditioner: Preconditioner) -> None:
    torch.manual_seed(0)
    model, loss_fn, inputs, targets = MODELS[name]()
    optimizer = HessianFree(model.parameters(), preconditioner=preconditioner)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = loss_fn(model(inputs), targets)
        loss.backward()
        return loss

    for _ in range(2):  # trace and find the cut
        optimizer.step(closure)
    step = peak_bytes(lambda: optimizer.step(closure))
    # K-FAC, which learns at the first steps, sees every patch of an image: nine times as many numbers as the image has
    bound = 3.0 if name == "images" and isinstance(preconditioner, KFAC) else 2.0
    assert step / gradient_bytes(model, loss_fn, inputs, targets) <= bound


def test_a_step_that_learns_nothing_copies_no_factor() -> None:
    torch.manual_seed(0)
    width = 600  # wider than K-FAC decomposes in full
    model = nn.Sequential(nn.Linear(width, 8), nn.Linear(8, 2))
    inputs, targets = torch.randn(32, width), torch.randn(32, 2)
    optimizer = HessianFree(model.parameters(), damping_rule=LevenbergMarquardt(every=1))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(inputs), targets)
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)
    learned = optimizer.state["hessfree"]["preconditioner"]
    step = peak_bytes(lambda: optimizer.step(closure))
    assert optimizer.state["hessfree"]["preconditioner"] is learned
    assert step <= 9 * gradient_bytes(model, nn.MSELoss(), inputs, targets)
    factor = learned["blocks"][0]["inner"]
    assert factor.shape == (width + 1, width + 1) and step <= 0.4 * factor.nbytes
    # nor does the state hold the eigenvectors that were dropped
    basis = learned["blocks"][0]["inner_basis"]
    assert basis.untyped_storage().nbytes() == basis.nbytes < 0.2 * factor.nbytes


class Watched(nn.Module):
    """Holds weak references to what only autograd keeps alive: the inputs of an activation."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 8), nn.Linear(8, 2)
        self.seen: list[weakref.ref[Tensor]] = []

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        self.seen.append(weakref.ref(h))
        return self.last(nn.functional.selu(h))


@pytest.mark.parametrize("backend", ["auto", "graph"])
@pytest.mark.parametrize("momentum", [None, QuadraticModelMomentum()], ids=["", "momentum"])
def test_the_graph_is_freed_before_the_products(backend: str, momentum: QuadraticModelMomentum | None) -> None:
    torch.manual_seed(0)
    model, x, y = Watched(), torch.randn(16, 3), torch.randn(16, 2)
    optimizer = HessianFree(
        model.parameters(),
        solver=CG(max_iterations=3),
        damping_rule=LevenbergMarquardt(every=1),
        linearization=backend,
        momentum=momentum,
    )
    alive: list[bool] = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        alive.extend(ref() is not None for ref in model.seen)  # at a replay: of the run that the products are of
        model.seen.clear()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)
    model.seen.clear()
    alive.clear()
    optimizer.step(closure)
    report = optimizer.last_step
    assert report is not None and report.evaluations == 1 and report.accepted
    assert alive == [backend == "graph"]  # whose products are made of it


def test_a_cut_inside_the_model_is_found_again_and_again() -> None:
    torch.manual_seed(0)

    class WithLoss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.norm = nn.Linear(3, 2), nn.BatchNorm1d(2)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return nn.functional.mse_loss(self.norm(self.net(x)), y)

    model = WithLoss().double()
    x, y = torch.randn(16, 3, dtype=torch.float64), torch.randn(16, 2, dtype=torch.float64)
    v = torch.randn(sum(p.numel() for p in model.parameters()), dtype=torch.float64)
    state = torch.get_rng_state()

    def loss_fn(loss: Tensor, _: None) -> Tensor:
        return loss

    def doubled(loss: Tensor, _: None) -> Tensor:
        return 2 * loss

    first = GaussNewton.from_loss(model, loss_fn, (x, y), None)
    wanted = GaussNewton.from_loss(model, loss_fn, (x, y), None, linearization="graph") @ v
    assert first.linearization.name == "traced"
    for function, factor in ((loss_fn, 1), (loss_fn, 1), (doubled, 2)):
        found = GaussNewton.from_loss(model, function, (x, y), None)
        assert found.linearization.name == "traced"
        assert torch.allclose(found @ v, factor * wanted, rtol=1e-10)
    assert torch.equal(torch.get_rng_state(), state)
    assert int(model.norm.num_batches_tracked) == 5  # one a call, also where the values of inner calls were wanted


def test_a_loss_function_that_became_linear_is_refused() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)

    class Changing(nn.Module):
        linear = False

        def forward(self, z: Tensor, y: Tensor) -> Tensor:
            return (z - y).abs().mean() if self.linear else (z - y).square().mean()

    loss_fn, x, y = Changing(), torch.randn(4, 3), torch.randn(4, 2)
    GaussNewton.from_loss(model, loss_fn, x, y)
    loss_fn.linear = True
    with pytest.raises(ValueError, match="no Gauss-Newton cut"):
        GaussNewton.from_loss(model, loss_fn, x, y)
