"""Closed-form moments of the input of a flow-matching network."""

import torch
from torch import nn

from experiments.models import ToyMLP
from experiments.moments import flow_matching_moments, flow_matching_moments_of
from experiments.optimizers.known_inputs import moments_of_first_layer
from experiments.paths import STRAIGHT
from hessfree import HessianFree
from hessfree.preconditioners import KFAC, InputMoments


def data(n: int = 50, dim: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, dim, generator=generator) @ torch.randn(dim, dim, generator=generator) + 2


def test_exactly_for_one_point() -> None:
    """With t in Gauss-Legendre points and x0 in +-e_i sqrt(D), the averages are exact to rounding."""
    x1 = torch.tensor([1.0, -2.0], dtype=torch.float64)
    nodes = torch.tensor([-(0.6**0.5), 0.0, 0.6**0.5], dtype=torch.float64) / 2 + 0.5
    weights = torch.tensor([5 / 18, 8 / 18, 5 / 18], dtype=torch.float64)
    corners = torch.cat([torch.eye(2, dtype=torch.float64), -torch.eye(2, dtype=torch.float64)]) * 2**0.5
    mean, second = torch.zeros(3, dtype=torch.float64), torch.zeros(3, 3, dtype=torch.float64)
    for t, w in zip(nodes, weights, strict=True):
        for x0 in corners:
            a = torch.cat([(1 - t) * x0 + t * x1, t.reshape(1)])
            mean, second = mean + w / 4 * a, second + w / 4 * torch.outer(a, a)
    found = flow_matching_moments(x1, torch.outer(x1, x1))
    assert (found.mean - mean).norm() <= 1e-13 and (found.second - second).norm() <= 1e-13


def test_against_batches_of_the_experiment() -> None:
    points, n = data(), 400_000
    generator = torch.Generator().manual_seed(1)
    batch = STRAIGHT.join(points[torch.randint(len(points), (n,), generator=generator)], generator)
    drawn = torch.cat([batch.x_t, batch.t], 1).double()
    sampled, exact = InputMoments.of(drawn), flow_matching_moments_of(points)
    error = (drawn.std(0) / n**0.5) * 5
    assert bool(((sampled.mean - exact.mean).abs() <= error).all())
    products = (drawn.unsqueeze(2) * drawn.unsqueeze(1)).std(0)
    assert bool(((sampled.second - exact.second).abs() <= 5 * products / n**0.5).all())


def test_they_fit_the_first_layer() -> None:
    model = ToyMLP(3, w=4, time_varying=True)
    KFAC(input_moments={model.net[0]: flow_matching_moments_of(data())})


def test_they_are_averaged_in_double_precision_where_there_is_some() -> None:
    # "meta" stands for a device on which nothing could be averaged, as float64 cannot on MPS
    weight = nn.Parameter(torch.empty(4, 3, device="meta"))
    [(key, moments)] = moments_of_first_layer("moons", [weight]).items()
    assert key is weight and {moments.mean.device.type, moments.second.device.type} == {"cpu"}
    assert moments.second.dtype == torch.float64 and bool(moments.second.isfinite().all())
    # K-FAC takes the factor to the layer's own precision and device
    model = ToyMLP(2, w=4, time_varying=True)
    optimizer = HessianFree(
        model.parameters(), preconditioner=KFAC(input_moments=moments_of_first_layer("moons", [*model.parameters()]))
    )
    x, t = data(8, 2), torch.rand(8, 1, generator=torch.Generator().manual_seed(0))

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (model(x, t) - x).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    block = optimizer.state["hessfree"]["preconditioner"]["blocks"][0]  # type: ignore[index]
    assert block["inner"].dtype == torch.float32
    torch.testing.assert_close(block["inner"], moments.factor(True).float())
