"""How far samples are from data: the energy distance, and the sliced Wasserstein distance.

Both are of two samples, so even two draws of the data are some way apart: the distance of such a pair is the floor to
compare with. They see what the figures of `Evaluation` do not, whether errors of the field add up along a path; they
saturate where those still tell optimizers apart.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_PAIRS = 2**22  # distances held at once
_PROJECTIONS = 256
_SEED = 20240  # the same directions for every sample


@dataclass(frozen=True)
class Quality:
    """How far a sample is from another.

    Attributes:
        energy_distance: See `energy_distance`.
        sliced_wasserstein: See `sliced_wasserstein`.
    """

    energy_distance: float
    sliced_wasserstein: float

    @classmethod
    def of(cls, x: Tensor, y: Tensor) -> "Quality":
        """Measure both.

        Args:
            x: Samples, `[n, D]`.
            y: Samples, `[m, D]`.

        Returns:
            The distances.
        """
        return cls(energy_distance(x, y), sliced_wasserstein(x, y))


def energy_distance(x: Tensor, y: Tensor) -> float:
    """Give the square root of 2 E|X - Y| - E|X - X'| - E|Y - Y'| (Székely & Rizzo 2013), without bias in the square.

    Args:
        x: Samples, `[n, D]`, n at least 2.
        y: Samples, `[m, D]`, m at least 2.

    Returns:
        The distance; its square is unbiased and may come out negative for equal distributions: 0 then. NaN if a sample
        is not finite.

    Raises:
        ValueError: If there are too few samples, or their dimensions differ.
    """
    _check(x, y)
    x, y = x.cpu().double(), y.cpu().double()
    within = sum(_distances(z, z) / (len(z) * (len(z) - 1)) for z in (x, y))
    squared = 2 * _distances(x, y) / (len(x) * len(y)) - within
    return math.sqrt(max(squared, 0.0)) if math.isfinite(squared) else math.nan


def _distances(x: Tensor, y: Tensor) -> float:
    """The sum of all |x_i - y_j|; of a point to itself it is exactly 0."""
    rows = max(1, _PAIRS // len(y))
    exact = "donot_use_mm_for_euclid_dist"  # |x|² + |y|² - 2xy would leave small distances without digits
    return math.fsum(torch.cdist(part, y, compute_mode=exact).sum().item() for part in x.split(rows))


def sliced_wasserstein(x: Tensor, y: Tensor) -> float:
    """Give the sliced 2-Wasserstein distance (Bonneel et al. 2015), by POT over 256 directions.

    Args:
        x: Samples, `[n, D]`, n at least 2.
        y: Samples, `[m, D]`, m at least 2.

    Returns:
        The square root of the mean over directions of the squared distance of the projections. NaN if a sample is not
        finite.

    Raises:
        ValueError: If there are too few samples, or their dimensions differ.
    """
    _check(x, y)
    import ot

    if not (x.isfinite().all() and y.isfinite().all()):
        return math.nan
    first, second = (z.cpu().double().numpy() for z in (x, y))
    return float(ot.sliced_wasserstein_distance(first, second, n_projections=_PROJECTIONS, seed=_SEED))


def _check(x: Tensor, y: Tensor) -> None:
    if x.dim() != 2 or y.dim() != 2 or x.shape[1] != y.shape[1] or min(len(x), len(y)) < 2:
        raise ValueError(
            f"samples of shapes {list(x.shape)} and {list(y.shape)} have no distance; give [n, D] and [m, D] with at "
            f"least two rows each"
        )
