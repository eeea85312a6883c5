"""The solve forms give one step: CG, dense and Gram on six networks with three losses, and inside the optimizer."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hessfree import CG, DenseCholesky, GaussNewton, GramCholesky, HessianFree
from hessfree.operators import FactoredRoot, Hessian, LowRank
from tests.architectures import DOUBLE, Attention, Recurrent, classes, mlp, randn
from tests.networks import make
from tests.oracle import error, truth


class Heads(nn.Module):
    """Several outputs a sample, a shared layer and a normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(3, 4)
        self.again = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.again(self.body(x).tanh()).tanh()
        return self.head(self.norm(self.again(x)))


def last(model: nn.Module) -> nn.Module:
    """Keep the last position of a sequence, two numbers of it."""
    return nn.Sequential(model, _Last())


class _Last(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, -1, :2]


MODELS: dict[str, tuple[Callable[[], nn.Module], Tensor, str]] = {  # and what is held of U
    "perceptron": (lambda: mlp(3, 5, 2), randn(6, 3), "layer factors"),
    "no bias, and dead units": (
        lambda: nn.Sequential(nn.Linear(3, 6, bias=False), nn.ReLU(), nn.Linear(6, 2)),
        randn(6, 3),
        "layer factors",
    ),
    "normalised, with a layer twice": (Heads, randn(6, 3), "layer factors and whole rows"),
    "convolution": (
        lambda: nn.Sequential(nn.Conv1d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(9, 2)),
        randn(6, 2, 4),
        "layer factors and whole rows",
    ),
    "attention": (lambda: last(Attention()), randn(4, 3, 4), "whole rows"),
    "recurrent": (lambda: last(Recurrent(nn.GRU)), randn(4, 3, 2), "whole rows"),
}


def squared(z: Tensor) -> Tensor:
    return F.mse_loss(z, torch.linspace(-1, 1, z.numel(), dtype=DOUBLE).view_as(z))


def cross_entropy(z: Tensor) -> Tensor:
    return F.cross_entropy(z, classes(len(z), high=2), label_smoothing=0.1)


def penalised(z: Tensor) -> Tensor:
    """By hand: a convex loss that couples the outputs of a sample."""
    return (z.square().sum(1) + (z[:, 0] * z[:, 1]).square() + z.exp().sum(1)).mean()


@pytest.mark.parametrize(
    ("loss", "damping"), [(squared, "one number"), (cross_entropy, "by group"), (penalised, "all different")]
)
@pytest.mark.parametrize("name", MODELS)
def test_three_forms_agree(name: str, loss: Callable[[Tensor], Tensor], damping: str) -> None:
    make_model, x, words = MODELS[name]
    torch.manual_seed(0)
    model = make_model().to(DOUBLE)
    operator = GaussNewton.from_loss(model, lambda z, _: loss(z), x, None, linearization="graph")
    root, _ = operator.low_rank()
    assert isinstance(root, FactoredRoot) and root.words == words
    groups = [torch.full_like(p, 0.01 * (1 + i)).view(-1) for i, p in enumerate(operator.parameters.params)]
    shift: float | Tensor = 0.01
    if damping != "one number":
        shift = torch.cat(groups) if damping == "by group" else 0.01 + 0.02 * randn(operator.size, seed=5).abs()
    rhs = randn(operator.size, seed=4)
    dense = DenseCholesky().solve(operator, rhs, shift).value
    gram = GramCholesky().solve(operator, rhs, shift).value
    products = CG(max_iterations=3000, tolerance=1e-11).solve(operator, rhs, shift).value
    assert error(gram, dense) <= 1e-8
    assert error(products, dense) <= 1e-8


@pytest.mark.parametrize("seed", [0, 1])
def test_steps_of_the_optimizer_are_the_same(seed: int) -> None:
    """With weight decay, groups, a part of the batch and accumulation; the dense form is the reference."""
    ends = []
    for solver in (DenseCholesky(), GramCholesky()):
        torch.manual_seed(seed)
        model = mlp(3, 6, 2)
        groups = [{"params": list(model[0].parameters()), "weight_decay": 0.3}, {"params": list(model[2].parameters())}]
        optimizer = HessianFree(
            groups, damping=0.05, weight_decay=0.01, solver=solver, curvature_batch=7, linearization="graph"
        )
        for step in range(4):

            def closure(step: int = step, model: nn.Module = model, optimizer: HessianFree = optimizer) -> None:
                optimizer.zero_grad()
                for k in range(2):
                    x = randn(9, 3, seed=10 * step + k)
                    loss = F.mse_loss(model(x), x[:, :2].sin())
                    loss.backward()

            if step % 2:
                closure()  # accumulates into p.grad
            x = randn(9, 3, seed=step)

            def final(x: Tensor = x, model: nn.Module = model, optimizer: HessianFree = optimizer) -> Tensor:
                optimizer.zero_grad()
                loss = F.mse_loss(model(x), x[:, :2].sin())
                loss.backward()
                return loss

            optimizer.step(final)
            assert optimizer.last_step is not None and optimizer.last_step.accepted
            assert optimizer.last_step.solver_status == "solved directly"
        ends.append(optimizer._parameters.values())  # type: ignore[union-attr]
    assert error(ends[1], ends[0]) <= 1e-8


def test_networks_of_linear_layers_stay_in_factors_inside_the_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    words: list[str] = []
    low_rank = GaussNewton.low_rank

    def listening(self: GaussNewton) -> LowRank:
        found = low_rank(self)
        words.append(getattr(found.root, "words", "products"))
        return found

    monkeypatch.setattr(GaussNewton, "low_rank", listening)
    ends = []
    for solver in (DenseCholesky(), GramCholesky()):
        torch.manual_seed(0)
        model = mlp(3, 6, 5, 2)
        optimizer = HessianFree(model.parameters(), damping=0.05, solver=solver)

        def closure(model: nn.Module = model, optimizer: HessianFree = optimizer) -> Tensor:
            optimizer.zero_grad()
            x = randn(8, 3, seed=optimizer.last_step.step if optimizer.last_step else 0)
            loss = F.mse_loss(model(x), x[:, :2].sin())
            loss.backward()
            return loss

        for _ in range(5):
            optimizer.step(closure)
            report = optimizer.last_step
            assert report is not None and report.accepted and report.backend == "traced"
            assert report.solver_status == "solved directly"
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert words == ["layer factors"] * 5
    assert error(ends[1], ends[0]) <= 1e-8


def test_a_penalty_in_the_closure_is_a_diagonal() -> None:
    problem = make("weight_penalty")
    operator = GaussNewton.from_loss(problem.model, problem.loss_fn, problem.inputs, problem.targets)
    rhs, g = randn(operator.size, seed=4), truth(problem).gauss_newton
    solution = GramCholesky().solve(operator, rhs, 0.1)
    expected = torch.linalg.solve(g + 0.1 * torch.eye(len(g), dtype=DOUBLE), rhs)
    assert error(solution.value, expected) <= 1e-10


def test_what_is_no_gram_matrix_is_refused_with_the_reason() -> None:
    model, x, y = mlp(3, 4, 2), randn(5, 3), randn(5, 2, seed=3)

    def refusal(loss_fn: Callable[[Tensor, Tensor], Tensor]) -> str:
        with pytest.raises(ValueError) as caught:
            GaussNewton.from_loss(model, loss_fn, x, y).low_rank()
        return str(caught.value)

    quartic = lambda z, y: F.mse_loss(z, y) + model[0].weight.square().sum().square()  # noqa: E731
    assert "has a Hessian that is not diagonal" in refusal(quartic) and "use solver=CG()" in refusal(quartic)
    coupled = lambda z, y: (z.exp() * model[2].bias.square()).mean()  # noqa: E731
    assert "couples the network's outputs with parameters" in refusal(coupled)
    indefinite = make("indefinite")
    assert indefinite.loss_fn is not None
    with pytest.raises(ValueError, match="negative ones make up .* of its eigenvalues"):
        GaussNewton.from_loss(indefinite.model, indefinite.loss_fn, indefinite.inputs, indefinite.targets).low_rank()
    hessian = Hessian.from_loss(model, F.mse_loss, x, y)
    with pytest.raises(ValueError, match="Hessian is no Gram matrix of known rows"):
        GramCholesky().solve(hessian, randn(hessian.size), 0.1)


@pytest.mark.parametrize("solver", [GramCholesky(), GramCholesky(momentum=0.9)])
@pytest.mark.parametrize("microbatch", [None, 20])
def test_trains(solver: GramCholesky, microbatch: int | None) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 1)), randn(32, 2).float()
    y = (x[:, :1] * 2).sin()
    optimizer = HessianFree(
        model.parameters(), solver=solver, damping=0.1, microbatch=microbatch, linearization="graph"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        return loss

    losses = [float(optimizer.step(closure)) for _ in range(10)]
    assert losses[-1] < 0.05 * losses[0]
