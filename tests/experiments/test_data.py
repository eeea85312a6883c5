import pytest
import torch

from experiments import data
from experiments.data import FiniteSet
from experiments.environment import UsageError


@pytest.mark.parametrize("name", data.OFFLINE)
def test_samples(name: str) -> None:
    dataset = data.load(name)
    assert dataset.name == name
    for draw in (dataset.sample, dataset.holdout):
        points = draw(50, torch.Generator().manual_seed(3))
        assert points.shape == (50, dataset.dim)
        assert points.dtype == torch.float32
        assert torch.equal(points, draw(50, torch.Generator().manual_seed(3)))
        assert not torch.equal(points, draw(50, torch.Generator().manual_seed(4)))


@pytest.mark.parametrize(
    ("name", "mean", "variance"),
    [
        # 8gaussians: half of 5² and 0.1**0.5 an axis; checkerboard: uniform on [-4, 4] an axis.
        ("8gaussians", (0.0, 0.0), (12.5 + 0.1**0.5, 12.5 + 0.1**0.5)),
        ("checkerboard", (0.0, 0.0), (16 / 3, 16 / 3)),
    ],
)
def test_moments(name: str, mean: tuple[float, float], variance: tuple[float, float]) -> None:
    points = data.load(name).sample(200_000, torch.Generator().manual_seed(0))
    torch.testing.assert_close(points.mean(0), torch.tensor(mean), rtol=0, atol=0.04)
    torch.testing.assert_close(points.var(0), torch.tensor(variance), rtol=0.02, atol=0)


def test_checkerboard_has_empty_squares() -> None:
    points = data.load("checkerboard").sample(10_000, torch.Generator().manual_seed(0))
    square = ((points + 4) / 2).floor()
    assert (square.sum(1) % 2 == 0).all()


def test_moons_are_those_of_scikit_learn() -> None:
    from sklearn.datasets import make_moons

    points, _ = make_moons(512, shuffle=False)
    torch.testing.assert_close(data.moons().means, torch.from_numpy(3 * points - 1))


@pytest.mark.parametrize("dim", [64, 784])
def test_digits_are_split_and_scaled(dim: int) -> None:
    dataset = data.digits(dim)
    assert isinstance(dataset, FiniteSet)
    assert dataset.training.shape == (1500, dim) and dataset.held_out.shape == (297, dim)
    assert dataset.training.min() >= -1 and dataset.training.max() <= 1
    if dim == 64:
        assert dataset.training.min() == -1 and dataset.training.max() == 1
        assert torch.cdist(dataset.held_out, dataset.training).min() > 0


def test_dimension_chooses_the_digits() -> None:
    assert data.load("digits").dim == 64
    assert data.load("digits", 784).name == "digits-784"
    assert data.load("digits-784", 784).dim == 784
    assert data.load("moons", 2).dim == 2


@pytest.mark.parametrize(
    ("name", "dim", "message"),
    [
        ("mnist?", None, "'mnist[?]'.*8gaussians, moons, checkerboard, digits"),
        ("moons", 64, "--dim 64.*moons.*2"),
        ("digits", 100, "--dim 100.*64 or 784"),
        ("digits-784", 64, "--dim 64.*784"),
    ],
)
def test_unknown_data(name: str, dim: int | None, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        data.load(name, dim)


def test_digits_of_another_size() -> None:
    with pytest.raises(UsageError, match="dim=100"):
        data.digits(100)
