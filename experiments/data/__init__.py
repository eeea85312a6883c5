"""Data sets that are drawn from a generator without end.

All points are float32 on the CPU whatever the training device, so that a seed gives the same data everywhere.
"""

from collections.abc import Callable
from pathlib import Path

from experiments.data.base import Dataset, Score
from experiments.data.densities import GaussianMixture, UniformSquares, checkerboard, eight_gaussians, moons
from experiments.data.finite import FiniteSet, digits
from experiments.data.images import DEFAULT_ROOT, IMAGES, images
from experiments.environment import UsageError

__all__ = [
    "DEFAULT_ROOT",
    "NAMES",
    "OFFLINE",
    "Dataset",
    "FiniteSet",
    "GaussianMixture",
    "Score",
    "UniformSquares",
    "checkerboard",
    "digits",
    "eight_gaussians",
    "images",
    "load",
    "moons",
]

_MADE: dict[str, Callable[[], Dataset]] = {"8gaussians": eight_gaussians, "moons": moons, "checkerboard": checkerboard}
OFFLINE = (*_MADE, "digits", "digits-784")  # these need neither files nor network
NAMES = (*OFFLINE, *IMAGES)


def load(name: str, dim: int | None = None, root: Path | None = None) -> Dataset:
    """Find a data set by name.

    Args:
        name: One of `NAMES`.
        dim: For `digits`, 64 or 784; None: what the name says. No other set has a choice.
        root: Where the images of `mnist` and `fashion-mnist` are, or shall go; see `images`.

    Returns:
        The data set.

    Raises:
        UsageError: If there is no such set, not with this dimension, or it cannot be read.
    """
    if name not in NAMES:
        raise UsageError(f"--data {name!r} is unknown; choose one of: {', '.join(NAMES)}")
    natural = {"digits": 64, "digits-784": 784, **dict.fromkeys(IMAGES, 784)}.get(name, 2)
    if dim is not None and dim != natural and (name != "digits" or dim != 784):
        allowed = "64 or 784" if name == "digits" else str(natural)
        raise UsageError(f"--dim {dim} does not fit --data {name}; leave it out or give {allowed}")
    if name in IMAGES:
        return images(name, root)
    return _MADE[name]() if name in _MADE else digits(dim or natural)
