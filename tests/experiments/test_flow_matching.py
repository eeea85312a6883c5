import pytest
import torch

from experiments import data, flow_matching
from experiments.flow_matching import Batch, BatchStream, Evaluation, sample_batch
from experiments.models import ToyMLP
from experiments.problems.flow import make_flow


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


def test_excess_against_a_million_samples() -> None:
    """The fixed points against fresh ones, and against E(v - u)² - E(u - E[u | x_t, t])², which is the same number."""
    dataset, n = data.load("8gaussians"), 1_000_000

    def field(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        # as far from the exact field as a trained network is, in a way that is no function of it
        return dataset.conditional_expectation(x, t) + 0.1 * torch.sin(2 * x.flip(1)) * (0.5 + t)

    generator = torch.Generator().manual_seed(99)
    direct, indirect = [], []
    for _ in range(10):
        rows = sample_batch(dataset, n // 10, generator)
        exact = dataset.conditional_expectation(rows.x_t, rows.t)
        v = exact + 0.1 * torch.sin(2 * rows.x_t.flip(1)) * (0.5 + rows.t)
        direct.append((v - exact).square().mean(1).double())
        indirect.append(((v - rows.u).square() - (rows.u - exact).square()).mean(1).double())
    metric = Evaluation.of(dataset).excess_loss(field)
    fresh, difference = torch.cat(direct), torch.cat(direct) - torch.cat(indirect)
    error = (fresh.std() / 16384**0.5 + fresh.std() / n**0.5).item()
    assert abs(metric - fresh.mean().item()) < 3 * error < 0.05 * metric
    assert difference.mean().abs() < 4 * difference.std() / n**0.5
    assert 4 * difference.std() / n**0.5 < 0.3 * metric


def test_other_networks_have_other_names() -> None:
    moons = data.load("moons")
    names = [
        make_flow(target, moons, torch.device("cpu"), width=width, n_hidden=layers).name
        for target in ("raw", "stable", "fixed")
        for width, layers in ((64, 3), (8, 3), (64, 1), (8, 1))
    ]
    assert names[:4] == ["moons", "moons-w8", "moons-l1", "moons-w8-l1"]
    assert names[-4:] == ["moons-fixed", "moons-fixed-w8", "moons-fixed-l1", "moons-fixed-w8-l1"]
    assert len(set(names)) == 12
