"""A second library's curvature matrices, on its own losses and reductions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hessfree import EmpiricalFisher, GaussNewton, Hessian, MonteCarloFisher
from hessfree.operators import SymmetricOperator
from tests.architectures import ConvNet, classes, mlp, randn
from tests.oracle import error

curvlinops = pytest.importorskip("curvlinops")

# the first forward-mode product of a process scripts some decompositions, and torch.jit is deprecated
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*")

WEIGHT = torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64)
IGNORED = torch.tensor([0, 2, -100, 1, -100, 2])
LOSSES: dict[str, tuple[Any, Any]] = {  # of three outputs, by name: the class with its settings, and targets
    "MSELoss": (nn.MSELoss, randn(6, 3, seed=3)),
    "CrossEntropyLoss": (nn.CrossEntropyLoss, classes(6, high=3)),
    "CrossEntropyLoss, weights": (lambda **k: nn.CrossEntropyLoss(weight=WEIGHT, **k), classes(6, high=3)),
    "CrossEntropyLoss, ignore_index": (nn.CrossEntropyLoss, IGNORED),
    "CrossEntropyLoss, both": (lambda **k: nn.CrossEntropyLoss(weight=WEIGHT, ignore_index=-100, **k), IGNORED),
    "BCEWithLogitsLoss": (nn.BCEWithLogitsLoss, classes(6, 3, high=2).double()),
}
MODELS: dict[str, tuple[Any, Tensor]] = {
    "MLP": (lambda: mlp(3, 4, 3), randn(6, 3)),
    "convolution": (lambda: ConvNet().double().eval(), randn(6, 1, 4, 4)),
}
REDUCTIONS = ("mean", "sum")


class Case:
    """A model and a loss, and the second library's operators of them."""

    def __init__(self, model: str, loss: str, reduction: str) -> None:
        torch.manual_seed(0)
        make_model, self.x = MODELS[model]
        make_loss, self.y = LOSSES[loss]
        self.model, self.loss = make_model(), make_loss(reduction=reduction)

    def theirs(self, kind: str, **options: Any) -> Any:
        params, data = list(self.model.parameters()), [(self.x, self.y)]
        return getattr(curvlinops, kind)(self.model, self.loss, params, data, check_deterministic=False, **options)

    def ours(self, kind: type[SymmetricOperator], **options: Any) -> Any:
        return kind.from_loss(self.model, self.loss, self.x, self.y, **options)  # type: ignore[attr-defined]


def compare(ours: SymmetricOperator, theirs: Any) -> None:
    v = randn(ours.size, seed=5)
    assert error(ours @ v, theirs @ v) <= 1e-10
    assert error(ours.to_dense(), theirs @ torch.eye(ours.size, dtype=torch.float64)) <= 1e-10


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gauss_newton(model: str, loss: str, reduction: str) -> None:
    case = Case(model, loss, reduction)
    compare(case.ours(GaussNewton), case.theirs("GGNLinearOperator"))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_hessian(model: str, loss: str, reduction: str) -> None:
    case = Case(model, loss, reduction)
    compare(case.ours(Hessian), case.theirs("HessianLinearOperator"))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_empirical_fisher(model: str, loss: str, reduction: str) -> None:
    case = Case(model, loss, reduction)
    # of a mean it takes the outputs of MSELoss and BCEWithLogitsLoss for terms, and not the samples
    elements = reduction == "mean" and not isinstance(case.loss, nn.CrossEntropyLoss)
    ours = case.ours(EmpiricalFisher, terms=18 if elements else None)
    compare(ours, case.theirs("EFLinearOperator"))
    if elements:
        assert error(3 * case.ours(EmpiricalFisher).to_dense(), ours.to_dense()) <= 1e-12


# it draws targets from the likelihood, which knows neither weights nor ignored targets
@pytest.mark.parametrize("loss", ["MSELoss", "CrossEntropyLoss", "BCEWithLogitsLoss"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_monte_carlo_fisher(loss: str, reduction: str) -> None:
    case = Case("MLP", loss, reduction)
    draws, seed = 3, 11
    theirs = case.theirs("FisherMCLinearOperator", mc_samples=draws, seed=seed)
    # the same draws: its targets' gradients in the outputs, for a sum that the reduction divides
    sampler = curvlinops.fisher.make_grad_output_sampler(case.loss)
    z = case.model(case.x).detach()
    drawn = sampler(z, draws, case.y, torch.Generator().manual_seed(seed)).flatten(1)
    terms = {"sum": 1, "mean": len(z) if loss == "CrossEntropyLoss" else z.numel()}[reduction]
    exact = case.ours(GaussNewton)
    compare(MonteCarloFisher(exact.linearization, drawn / (draws * terms) ** 0.5, exact.parameters), theirs)


@pytest.mark.parametrize("loss", ["MSELoss", "CrossEntropyLoss", "BCEWithLogitsLoss"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_monte_carlo_fishers_have_one_expectation(loss: str, reduction: str) -> None:
    case = Case("MLP", loss, reduction)
    true = case.theirs("GGNLinearOperator") @ torch.eye(31, dtype=torch.float64)
    ours = case.ours(MonteCarloFisher, samples=2000)
    theirs = case.theirs("FisherMCLinearOperator", mc_samples=2000)
    for found in (ours.to_dense(), theirs @ torch.eye(31, dtype=torch.float64)):
        assert error(found, true) <= 0.06
