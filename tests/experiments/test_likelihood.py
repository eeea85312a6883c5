"""log p of flows whose densities are known, and of any flow by its integral."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from experiments import data
from experiments.flow_matching import Field
from experiments.likelihood import log_likelihood, random_signs
from experiments.models import ToyMLP
from experiments.sampling import Sampler

EXACT = Sampler(method="dopri5", tolerance=1e-9)


def gaussian_flow(mean: Tensor, covariance: Tensor) -> Field:
    """Return E[x1 - x0 | x_t] for x1 ~ N(mean, covariance): it carries N(0, I) into that."""
    identity = torch.eye(len(mean), dtype=mean.dtype)

    def field(x: Tensor, t: Tensor) -> Tensor:
        of_path = (1 - t) ** 2 * identity + t**2 * covariance
        gain = (t * covariance - (1 - t) * identity) @ torch.linalg.inv(of_path)
        return mean + (x - t * mean) @ gain.mT

    return field


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def gaussian() -> tuple[Tensor, Tensor, Tensor]:
    mean = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    root = torch.randn(3, 3, generator=generator(), dtype=torch.float64)
    covariance = root @ root.mT + 0.1 * torch.eye(3, dtype=torch.float64)
    return mean, covariance, mean + 2 * torch.randn(5, 3, generator=generator(), dtype=torch.float64)


def test_a_gaussian_becomes_a_gaussian() -> None:
    mean, covariance, x = gaussian()
    true = torch.distributions.MultivariateNormal(mean, covariance).log_prob(x)
    found = log_likelihood(gaussian_flow(mean, covariance), x, sampler=EXACT)
    torch.testing.assert_close(found.log_density, true, rtol=0, atol=1e-7)
    equal_steps = log_likelihood(gaussian_flow(mean, covariance), x, sampler=Sampler(method="rk4", steps=100))
    torch.testing.assert_close(equal_steps.log_density, true, rtol=0, atol=1e-5)
    assert equal_steps.evaluations == 400


def test_hutchinson_is_exact_on_diagonals_and_unbiased_elsewhere() -> None:
    mean, covariance, x = gaussian()
    diagonal = covariance.diagonal().diag()
    true = torch.distributions.MultivariateNormal(mean, diagonal).log_prob(x)
    noise = random_signs(x, generator())
    assert set(noise.unique().tolist()) == {-1.0, 1.0}
    found = log_likelihood(gaussian_flow(mean, diagonal), x, noise=noise, sampler=EXACT).log_density
    torch.testing.assert_close(found, true, rtol=0, atol=1e-7)
    # all eight noises of three signs have the same chance: their mean is the expectation
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * 3)
    one = x[:1].expand(8, 3)
    field = gaussian_flow(mean, covariance)
    estimates = log_likelihood(field, one, noise=signs, sampler=EXACT).log_density
    exact = torch.distributions.MultivariateNormal(mean, covariance).log_prob(x[:1])
    torch.testing.assert_close(estimates.mean(), exact[0], rtol=0, atol=1e-6)
    assert float(estimates.std()) > 0.01
    again = log_likelihood(field, one, noise=signs, sampler=EXACT).log_density
    assert torch.equal(estimates, again)


def grid(half: float, points: int, dtype: torch.dtype) -> tuple[Tensor, float]:
    line = torch.linspace(-half, half, points, dtype=dtype)
    return torch.cartesian_prod(line, line), (2 * half / (points - 1)) ** 2


@pytest.mark.parametrize("name", ["8gaussians", "moons"])
def test_the_exact_field_of_a_set_gives_its_density(name: str) -> None:
    found = data.load(name)
    means, variance = found.means, found.variance  # type: ignore[attr-defined]
    means = means[:: max(1, len(means) // 32)]  # of the moons' 512, some: all would take a minute

    def field(x: Tensor, t: Tensor) -> Tensor:
        of_path = (1 - t) ** 2 + variance * t**2
        weights = torch.softmax(-(x[:, None] - t * means).square().sum(2) / (2 * of_path), 1)
        mean = weights @ means
        return mean + (t * variance - (1 - t)) / of_path * (x - t * mean)

    x, area = grid(9.0, 46, torch.float64)
    density = log_likelihood(field, x, sampler=Sampler(method="rk4", steps=30)).log_density.exp()
    squares = (x[:, None] - means).square().sum(2)
    true = (-squares / (2 * variance)).exp().mean(1) / (2 * math.pi * variance)
    assert float((density - true).abs().max() / true.max()) <= 2e-3
    assert abs(float(density.sum()) * area - 1) <= 2e-3


def test_the_density_of_any_network_integrates_to_one() -> None:
    torch.manual_seed(0)
    net = ToyMLP(2, time_varying=True).double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter *= 1.5  # or the flow would hardly leave the normal
    x, area = grid(9.0, 81, torch.float64)
    found = log_likelihood(net, x, sampler=Sampler(method="rk4", steps=20))
    density = found.log_density.exp()
    assert abs(float(density.sum()) * area - 1) <= 1e-3
    normal = (-0.5 * x.square().sum(1)).exp() / (2 * math.pi)
    assert float((density - normal).abs().max()) > 0.02
    back = Sampler(method="rk4", steps=20).carry(net, found.latents)
    near = x.square().sum(1) < 16
    torch.testing.assert_close(back[near], x[near], rtol=0, atol=1e-3)


def test_noise_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"noise has shape \[2, 1\].*\[2, 2\]"):
        log_likelihood(lambda x, t: x, torch.ones(2, 2), noise=torch.ones(2, 1))
