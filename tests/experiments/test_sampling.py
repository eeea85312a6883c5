import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from experiments import data
from experiments.environment import UsageError
from experiments.likelihood import log_likelihood
from experiments.models import ToyMLP
from experiments.sampling import METHODS, Sampler


@pytest.mark.parametrize("method", ["midpoint", "rk4", "dopri5"])
def test_exact_field_generates_the_data(method: str) -> None:
    dataset = data.load("8gaussians")
    sampler = Sampler(method=method, steps=40, tolerance=1e-4)  # type: ignore[arg-type]
    samples = sampler.generate(dataset.conditional_expectation, 4000, 2, torch.Generator().manual_seed(0))
    distance = torch.cdist(samples, dataset.means.float())  # type: ignore[attr-defined]
    nearest, counts = distance.argmin(1).unique(return_counts=True)
    assert len(nearest) == 8 and (counts > 400).all()
    assert distance.min(1).values.square().mean().item() == pytest.approx(2 * 0.1**0.5, rel=0.1)


def growth(x: Tensor, t: Tensor) -> Tensor:
    return x * t  # x(1) = x(0) exp(1/2)


def error(**settings: object) -> float:
    start = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    end = Sampler(**settings).carry(growth, start)  # type: ignore[arg-type]
    return (end / start - math.exp(0.5)).abs().max().item()


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("midpoint", 2), ("rk4", 4)])
def test_order_of_the_rules(method: str, order: int) -> None:
    assert error(method=method, steps=16) / error(method=method, steps=32) == pytest.approx(2**order, rel=0.1)


def test_the_adaptive_rule_keeps_its_tolerance() -> None:
    assert error(method="dopri5", tolerance=1e-4) < 1e-3
    assert error(method="dopri5", tolerance=1e-8) < 1e-7


@pytest.mark.parametrize("method", METHODS)
def test_samples_are_reproducible(method: str) -> None:
    torch.manual_seed(0)
    field = ToyMLP(2, time_varying=True)
    sampler = Sampler(method=method, steps=3)  # type: ignore[arg-type]
    one, two, other = (sampler.generate(field, 8, 2, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(one, two) and not torch.equal(one, other)
    assert not one.requires_grad


@pytest.mark.parametrize("method", METHODS)
def test_a_field_that_diverges(method: str) -> None:
    sampler = Sampler(method=method, steps=20)  # type: ignore[arg-type]
    samples = sampler.generate(lambda x, t: 1e30 * x**3, 8, 2, torch.Generator().manual_seed(0))
    assert samples.shape == (8, 2) and not samples.isfinite().all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"steps": 0}, "--sampler-steps 0"), ({"method": "leap"}, "'leap'.*euler, midpoint"), ({"tolerance": 0.0}, "0")],
)
def test_settings_that_make_no_sense(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Sampler(**settings)  # type: ignore[arg-type]


class NoDoubles(TorchDispatchMode):
    """A device without float64, as MPS is."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        assert not (isinstance(result, Tensor) and result.dtype == torch.float64), func
        return result


def test_the_adaptive_rule_needs_no_double_precision_on_mps(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler, mps = Sampler(method="dopri5", tolerance=1e-4), torch.device("mps")
    assert sampler.for_solver(mps)["options"] == {"dtype": torch.float32}
    assert sampler.for_solver(torch.device("cpu"))["options"] is None
    assert Sampler(method="rk4").for_solver(mps) == {"method": "rk4"}
    kept = Sampler.for_solver
    monkeypatch.setattr(Sampler, "for_solver", lambda self, device: kept(self, mps))
    start = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    with NoDoubles():
        end = sampler.carry(growth, start)
        # the field x·t has the divergence 3t, and a normal of variance e for its density
        found = log_likelihood(growth, end, sampler=sampler)
    torch.testing.assert_close(end, start * math.exp(0.5), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found.latents, start, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(
        found.log_density, torch.distributions.Normal(0, math.exp(0.5)).log_prob(end).sum(1), rtol=1e-3, atol=1e-3
    )


def test_dopri5_gives_up_all_points_for_one() -> None:
    start = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    assert Sampler(method="dopri5").carry(lambda x, t: 1e30 * x**3, start).isnan().all()
    assert Sampler(steps=20).carry(lambda x, t: 1e30 * x**3, start)[0].isfinite().all()
