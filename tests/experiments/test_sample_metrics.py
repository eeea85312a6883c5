import math

import numpy as np
import pytest
import torch
from scipy import stats

from experiments.sample_metrics import energy_distance, sliced_wasserstein


def normal(n: int, dim: int, seed: int, shift: float = 0.0) -> torch.Tensor:
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed)) + shift


def test_energy_distance_by_hand() -> None:
    x, y = torch.tensor([[0.0, 0.0], [3.0, 4.0]]), torch.tensor([[0.0, 0.0], [0.0, 1.0], [0.0, 3.0]])
    between = (0 + 1 + 3 + 5 + 18**0.5 + 10**0.5) / 6
    expected = 2 * between - 5 - (1 + 3 + 2) / 3
    assert expected < 0 and energy_distance(x, y) == 0
    far = y + 100
    between = sum(math.dist(a, b) for a in x.tolist() for b in far.tolist()) / 6
    assert energy_distance(x, far) == pytest.approx(math.sqrt(2 * between - 5 - 2), rel=1e-12)


def test_energy_distance_is_that_of_scipy_in_one_dimension() -> None:
    x, y = normal(400, 1, 0), normal(300, 1, 1, shift=1.0)
    biased = stats.energy_distance(x[:, 0].numpy(), y[:, 0].numpy()) ** 2
    # scipy counts each point as a neighbour of itself: E|X - X'| is smaller by (n-1)/n there
    within = [np.abs(z.numpy() - z.numpy().T).mean() / (len(z) - 1) for z in (x, y)]
    assert energy_distance(x, y) ** 2 == pytest.approx(biased - sum(within), rel=1e-4)


def test_energy_distance_does_not_depend_on_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = normal(50, 3, 0), normal(41, 3, 1, shift=0.5)
    whole = energy_distance(x, y)
    monkeypatch.setattr("experiments.sample_metrics._PAIRS", 100)
    assert energy_distance(x, y) == pytest.approx(whole, rel=1e-12)


def test_equal_distributions_are_at_the_floor() -> None:
    x, y, shifted = normal(3000, 2, 0), normal(3000, 2, 1), normal(3000, 2, 2, shift=0.3)
    assert energy_distance(x, y) < 0.05 < 0.15 < energy_distance(x, shifted)
    assert sliced_wasserstein(x, y) < 0.08 < 0.25 < sliced_wasserstein(x, shifted)


def test_sliced_wasserstein_of_a_shift() -> None:
    x = normal(500, 2, 0)
    # the square of a shift's projection is |shift|²/D on average, whatever the distribution
    assert sliced_wasserstein(x, x + torch.tensor([3.0, 4.0])) == pytest.approx(5 / 2**0.5, rel=0.05)
    assert sliced_wasserstein(x, x) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("distance", [energy_distance, sliced_wasserstein])
def test_samples_that_make_no_sense(distance: object) -> None:
    assert callable(distance)
    assert math.isnan(distance(torch.full((4, 2), math.nan), normal(4, 2, 0)))
    with pytest.raises(ValueError, match=r"\[4, 3\] and \[4, 2\]"):
        distance(normal(4, 3, 0), normal(4, 2, 0))
    with pytest.raises(ValueError, match=r"\[1, 2\]"):
        distance(normal(1, 2, 0), normal(4, 2, 0))
