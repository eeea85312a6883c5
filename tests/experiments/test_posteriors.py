"""The closed forms against integrals over x1 that know nothing of them."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from experiments import data
from experiments.data import FiniteSet, GaussianMixture, UniformSquares

POINTS = torch.tensor([[0.3, -0.2], [2.5, 1.0], [-3.0, 3.2], [4.5, -1.5]], dtype=torch.float64)


def grid(edges: list[float], nodes: int) -> tuple[Tensor, Tensor]:
    """Gauss-Legendre nodes and weights on each interval between edges."""
    x, w = (torch.from_numpy(array) for array in np.polynomial.legendre.leggauss(nodes))
    pairs = list(zip(edges, edges[1:], strict=False))
    points = torch.cat([low + (high - low) * (x + 1) / 2 for low, high in pairs])
    return points, torch.cat([w * (high - low) / 2 for low, high in pairs])


def integrated(density: Callable[[Tensor], Tensor], edges: list[float], x_t: Tensor, t: float) -> Tensor:
    """E[x1 - x0 | x_t] as a ratio of two integrals over the plane of x1."""
    nodes, weights = grid(edges, 40)
    x1 = torch.cartesian_prod(nodes, nodes)
    mass = (weights[:, None] * weights[None, :]).flatten() * density(x1)
    x0 = (x_t[:, None] - t * x1) / (1 - t)
    mass = mass * torch.exp(-x0.square().sum(-1) / 2)
    return (mass[..., None] * (x1 - x0)).sum(1) / mass.sum(1, keepdim=True)


def mixture_density(dataset: GaussianMixture) -> Callable[[Tensor], Tensor]:
    def density(x1: Tensor) -> Tensor:
        total = torch.zeros(len(x1), dtype=x1.dtype)
        for mean in dataset.means:
            total += torch.exp((x1 - mean).square().sum(1) / (-2 * dataset.variance))
        return total

    return density


def squares_density(dataset: UniformSquares) -> Callable[[Tensor], Tensor]:
    def density(x1: Tensor) -> Tensor:
        inside = (x1[:, None] > dataset.corners) & (x1[:, None] < dataset.corners + dataset.side)
        return inside.all(-1).any(1).double()

    return density


@pytest.mark.parametrize("t", [0.01, 0.3, 0.49, 0.51, 0.8])
@pytest.mark.parametrize("name", ["8gaussians", "moons", "checkerboard"])
def test_against_integrals(name: str, t: float) -> None:
    dataset = data.load(name)
    if isinstance(dataset, UniformSquares):
        expected = integrated(squares_density(dataset), [-4.0, -2.0, 0.0, 2.0, 4.0], POINTS, t)
    else:
        assert isinstance(dataset, GaussianMixture)
        expected = integrated(mixture_density(dataset), [2.0 * edge for edge in range(-5, 6)], POINTS, t)
    actual = dataset.conditional_expectation(POINTS, torch.tensor(t, dtype=torch.float64))
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", ["8gaussians", "moons", "checkerboard", "digits"])
def test_ends_of_the_path(name: str) -> None:
    dataset = data.load(name)
    generator = torch.Generator().manual_seed(0)
    x0 = torch.randn(64, dataset.dim, generator=generator, dtype=torch.float64)
    x1 = dataset.sample(64, generator).double()
    mean = {"8gaussians": 0.0, "moons": None, "checkerboard": 0.0, "digits": None}[name]
    for t in (0.0, 1e-9):
        actual = dataset.conditional_expectation(x0, torch.tensor(t))
        if isinstance(dataset, FiniteSet):
            expected = dataset.training.double().mean(0) - x0
        else:
            expected = (mean if mean is not None else dataset.means.mean(0)) - x0  # type: ignore[attr-defined]
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    if name in ("8gaussians", "moons"):
        torch.testing.assert_close(dataset.conditional_expectation(x1, torch.tensor(1.0)), x1, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["8gaussians", "moons", "checkerboard", "digits"])
def test_finite_everywhere(name: str) -> None:
    dataset = data.load(name)
    far = 30 * torch.randn(512, dataset.dim, generator=torch.Generator().manual_seed(0))
    for t in (0.0, 1e-7, 0.5, 1 - 1e-7, 1.0):
        assert dataset.conditional_expectation(far, torch.tensor(t)).isfinite().all()


def test_finite_set_is_a_weighted_mean_of_its_points() -> None:
    points = torch.tensor([[0.0, 0.0], [1.0, 2.0], [-1.0, 1.0]])
    dataset = FiniteSet("three", points, points)
    x_t, t = torch.tensor([[0.2, 0.5]], dtype=torch.float64), 0.6
    x0 = (x_t - t * points.double()) / (1 - t)
    weights = torch.exp(-x0.square().sum(1) / 2)
    expected = (weights[:, None] * (points.double() - x0)).sum(0) / weights.sum()
    actual = dataset.conditional_expectation(x_t, torch.tensor([t], dtype=torch.float64))
    torch.testing.assert_close(actual[0], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["8gaussians", "checkerboard"])
def test_forms_of_time_chunks_and_dtype(name: str) -> None:
    dataset = data.load(name)
    x = torch.randn(20_000, 2, generator=torch.Generator().manual_seed(0))  # more rows than one chunk holds
    t = torch.rand(20_000, 1, generator=torch.Generator().manual_seed(1))
    whole = dataset.conditional_expectation(x, t)
    assert whole.dtype == torch.float32
    torch.testing.assert_close(dataset.conditional_expectation(x[-7:], t[-7:, 0]), whole[-7:])
    assert dataset.conditional_expectation(x[:0], t[:0]).shape == (0, 2)
