import pytest
import torch
from torch import Tensor

from experiments import data, flow_matching
from experiments.flow_matching import Batch, BatchStream, Evaluation, generate, sample_batch
from experiments.models import ToyMLP


def test_batch_lies_on_straight_paths() -> None:
    batch = sample_batch(data.load("moons"), 100, torch.Generator().manual_seed(0))
    x1, x0 = batch.x_t + (1 - batch.t) * batch.u, batch.x_t - batch.t * batch.u
    expected = data.load("moons").sample(100, torch.Generator().manual_seed(0))
    torch.testing.assert_close(x1, expected)
    assert x0.std() == pytest.approx(1, abs=0.2)
    assert len(batch) == 100 and batch.t.shape == (100, 1)
    assert ((batch.t >= 0) & (batch.t < 1)).all()


def test_stream_does_not_depend_on_how_it_is_cut() -> None:
    dataset = data.load("8gaussians")
    whole = BatchStream(dataset, seed=5).draw(20_000)
    stream = BatchStream(dataset, seed=5)
    start = 0
    for n in (256, 1000, 8192, 10_552):
        part = stream.draw(n)
        for name in ("x_t", "t", "u"):
            assert torch.equal(getattr(part, name), getattr(whole, name)[start : start + n])
        start += n
    assert not torch.equal(BatchStream(dataset, seed=6).draw(10).u, whole.u[:10])


def test_loss_is_a_mean_over_rows_and_components() -> None:
    batch = Batch(torch.zeros(2, 2), torch.zeros(2, 1), torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    assert flow_matching.loss(lambda x, t: x, batch).item() == pytest.approx(30 / 4)


@pytest.mark.parametrize("name", ["8gaussians", "moons", "checkerboard", "digits"])
def test_exact_field_has_no_excess(name: str) -> None:
    dataset = data.load(name)
    evaluation = Evaluation.of(dataset, n=2000)
    assert evaluation.excess_loss(dataset.conditional_expectation) == 0
    assert flow_matching.loss(dataset.conditional_expectation, evaluation.points).item() == pytest.approx(
        evaluation.noise_floor
    )


@pytest.mark.parametrize("name", ["8gaussians", "moons", "checkerboard"])
def test_loss_is_noise_floor_plus_excess(name: str) -> None:
    dataset = data.load(name)
    evaluation = Evaluation.of(dataset, n=100_000)
    torch.manual_seed(0)
    field = ToyMLP(2, time_varying=True)
    points = evaluation.points
    with torch.no_grad():
        cross = 2 * ((points.u - evaluation.expectation) * (evaluation.expectation - field(points.x_t, points.t)))
        total = flow_matching.loss(field, points).item()
    standard_error = cross.mean(1).std().item() / len(points) ** 0.5
    # Only the cross term, of mean zero if the expectation is right, separates the two sides.
    assert abs(total - evaluation.noise_floor - evaluation.excess_loss(field)) < 4 * standard_error


def test_noise_floor_of_eight_gaussians() -> None:
    assert Evaluation.of(data.load("8gaussians")).noise_floor == pytest.approx(4.93, abs=0.1)


def test_evaluation_is_the_same_every_time() -> None:
    torch.manual_seed(0)
    field = ToyMLP(64, time_varying=True)
    first, second = (Evaluation.of(data.load("digits"), n=300) for _ in range(2))
    assert first.holdout_loss(field) == second.holdout_loss(field)
    assert first.excess_loss(field) == second.excess_loss(field)


@pytest.mark.parametrize("method", ["midpoint", "rk4"])
def test_exact_field_generates_the_data(method: str) -> None:
    dataset = data.load("8gaussians")
    samples = generate(
        dataset.conditional_expectation, 4000, 2, torch.Generator().manual_seed(0), steps=40, method=method
    )
    distance = torch.cdist(samples, dataset.means.float())  # type: ignore[attr-defined]
    nearest, counts = distance.argmin(1).unique(return_counts=True)
    assert len(nearest) == 8 and (counts > 400).all()
    assert distance.min(1).values.square().mean().item() == pytest.approx(2 * 0.1**0.5, rel=0.1)


def test_order_of_the_sampler() -> None:
    def field(x: Tensor, t: Tensor) -> Tensor:
        return x * t  # x(1) = x(0) exp(1/2)

    def error(steps: int, method: str) -> float:
        start = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
        samples = generate(field, 5, 3, torch.Generator().manual_seed(0), steps=steps, method=method)
        return (samples / start - torch.e**0.5).abs().max().item()

    assert 3.5 < error(4, "midpoint") / error(8, "midpoint") < 4.6
    assert error(8, "rk4") < error(8, "midpoint") / 50


def test_samples_are_reproducible() -> None:
    torch.manual_seed(0)
    field = ToyMLP(2, time_varying=True)
    one, two, other = (generate(field, 8, 2, torch.Generator().manual_seed(seed), steps=3) for seed in (1, 1, 2))
    assert torch.equal(one, two) and not torch.equal(one, other)
    assert not one.requires_grad


def test_no_steps() -> None:
    with pytest.raises(ValueError, match="steps=0"):
        generate(lambda x, t: x, 1, 2, torch.Generator(), steps=0)
