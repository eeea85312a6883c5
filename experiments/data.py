"""Data sets that are drawn from a generator without end, with E[u | x_t, t] of their flow-matching path in closed form.

All points are float32 on the CPU whatever the training device, so that a seed gives the same data everywhere.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from experiments.environment import UsageError
from experiments.posteriors import mixture_velocity, squares_velocity

Score = Literal["excess_loss", "holdout_loss"]

_DIGITS_FOR_TRAINING = 1500  # of 1797
_DIGITS_SPLIT_SEED = 7


class Dataset(Protocol):
    """What the experiments ask of data."""

    @property
    def name(self) -> str:
        """The name on the command line."""

    @property
    def dim(self) -> int:
        """Number of components D of a point."""

    @property
    def score(self) -> Score:
        """The figure by which optimizers are compared on these data."""

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """Draw training points `[n, D]`."""

    def holdout(self, n: int, generator: torch.Generator) -> Tensor:
        """Draw points `[n, D]` that training never sees."""

    def conditional_expectation(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Give E[u | x_t, t] `[n, D]` for x_t = (1-t) x0 + t x1, u = x1 - x0, x0 standard normal."""


@dataclass(frozen=True)
class GaussianMixture:
    """Equally likely Gaussians with one spherical variance.

    Attributes:
        name: The name on the command line.
        means: Centres, `[K, D]`, float64.
        variance: Variance of each component along each axis.
        score: The excess loss, which is known exactly here.
    """

    name: str
    means: Tensor
    variance: float
    score: Score = "excess_loss"

    @property
    def dim(self) -> int:
        """Number of components D of a point."""
        return self.means.shape[1]

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """Draw points.

        Args:
            n: How many.
            generator: The source of randomness, on the CPU.

        Returns:
            Points, `[n, D]`, float32.
        """
        centres = self.means.float()[torch.randint(len(self.means), (n,), generator=generator)]
        return centres + math.sqrt(self.variance) * torch.randn(n, self.dim, generator=generator)

    def holdout(self, n: int, generator: torch.Generator) -> Tensor:
        """Draw points; every draw of a streaming set is new, so these are `sample`'s.

        Args:
            n: How many.
            generator: The source of randomness, on the CPU.

        Returns:
            Points, `[n, D]`, float32.
        """
        return self.sample(n, generator)

    def conditional_expectation(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Give E[u | x_t, t] in closed form.

        Args:
            x_t: Points on the path, `[n, D]`.
            t: Their times, `[n, 1]`, `[n]` or one for all.

        Returns:
            The expectation, `[n, D]`, like `x_t`.
        """
        return mixture_velocity(x_t, t, self.means, self.variance)


@dataclass(frozen=True)
class UniformSquares:
    """A uniform distribution over equal squares (cubes, if D > 2).

    Attributes:
        name: The name on the command line.
        corners: The lowest corner of each square, `[K, D]`, float64.
        side: Length of a side.
        score: The excess loss, which is known exactly here.
    """

    name: str
    corners: Tensor
    side: float
    score: Score = "excess_loss"

    @property
    def dim(self) -> int:
        """Number of components D of a point."""
        return self.corners.shape[1]

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """Draw points.

        Args:
            n: How many.
            generator: The source of randomness, on the CPU.

        Returns:
            Points, `[n, D]`, float32.
        """
        corners = self.corners.float()[torch.randint(len(self.corners), (n,), generator=generator)]
        return corners + self.side * torch.rand(n, self.dim, generator=generator)

    def holdout(self, n: int, generator: torch.Generator) -> Tensor:
        """Draw points; every draw of a streaming set is new, so these are `sample`'s.

        Args:
            n: How many.
            generator: The source of randomness, on the CPU.

        Returns:
            Points, `[n, D]`, float32.
        """
        return self.sample(n, generator)

    def conditional_expectation(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Give E[u | x_t, t] in closed form.

        Args:
            x_t: Points on the path, `[n, D]`.
            t: Their times, `[n, 1]`, `[n]` or one for all.

        Returns:
            The expectation, `[n, D]`, like `x_t`.
        """
        return squares_velocity(x_t, t, self.corners, self.side)


@dataclass(frozen=True)
class FiniteSet:
    """A list of training points drawn with replacement, and a list of held-out points.

    Attributes:
        name: The name on the command line.
        training: `[K, D]`, float32.
        held_out: `[H, D]`, float32.
        score: The held-out loss: the exact field of the *training* points would only reproduce those points.
    """

    name: str
    training: Tensor
    held_out: Tensor
    score: Score = "holdout_loss"

    @property
    def dim(self) -> int:
        """Number of components D of a point."""
        return self.training.shape[1]

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """Draw training points with replacement.

        Args:
            n: How many.
            generator: The source of randomness, on the CPU.

        Returns:
            Points, `[n, D]`, float32.
        """
        return self.training[torch.randint(len(self.training), (n,), generator=generator)]

    def holdout(self, n: int, generator: torch.Generator) -> Tensor:
        """Draw held-out points with replacement.

        Args:
            n: How many.
            generator: The source of randomness, on the CPU.

        Returns:
            Points, `[n, D]`, float32.
        """
        return self.held_out[torch.randint(len(self.held_out), (n,), generator=generator)]

    def conditional_expectation(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Give E[u | x_t, t] under the training points, in closed form.

        Args:
            x_t: Points on the path, `[n, D]`.
            t: Their times, `[n, 1]`, `[n]` or one for all.

        Returns:
            The expectation, `[n, D]`, like `x_t`.
        """
        return mixture_velocity(x_t, t, self.training, variance=0.0)


def eight_gaussians() -> GaussianMixture:
    """Eight Gaussians on a circle of radius 5, variance sqrt(0.1) along each axis.

    Returns:
        The mixture, D = 2. Source: `eight_normal_sample` of torchcfm, where 0.1**0.5 enters as a covariance.
    """
    angles = torch.arange(8, dtype=torch.float64) * (math.pi / 4)
    return GaussianMixture("8gaussians", 5 * torch.stack([angles.cos(), angles.sin()], dim=1), 0.1**0.5)


def moons() -> GaussianMixture:
    """Two half circles with Gaussian noise, stretched to 3 x - 1.

    Returns:
        The mixture, D = 2: 256 equally spaced centres a moon, as scikit-learn's `make_moons(noise=0.2)` makes them
        (there as many as samples), noise 0.6 after the stretch. Source: `sample_moons` of torchcfm.
    """
    angles = torch.linspace(0, math.pi, 256, dtype=torch.float64)
    outer = torch.stack([angles.cos(), angles.sin()], dim=1)
    inner = torch.stack([1 - angles.cos(), 0.5 - angles.sin()], dim=1)
    return GaussianMixture("moons", 3 * torch.cat([outer, inner]) - 1, 0.6**2)


def checkerboard() -> UniformSquares:
    """The eight dark squares of a 4 x 4 board that covers [-4, 4] x [-4, 4].

    Returns:
        The distribution, D = 2, squares of side 2.
    """
    dark = [(row, column) for row in range(4) for column in range(4) if (row + column) % 2 == 0]
    return UniformSquares("checkerboard", 2 * torch.tensor(dark, dtype=torch.float64) - 4, side=2.0)


def digits(dim: int = 64) -> FiniteSet:
    """The 1797 handwritten digits of scikit-learn, grey values scaled from 0..16 to [-1, 1].

    Args:
        dim: 64 for the images as they are (8 x 8); 784 for images resized bilinearly to 28 x 28.

    Returns:
        1500 training and 297 held-out images, flattened; the split is fixed, whatever the seed of a run.

    Raises:
        UsageError: If `dim` is neither.
    """
    if dim not in (64, 784):
        raise UsageError(f"dim={dim!r}: digits have 64 or 784 components; choose one of these")
    from sklearn.datasets import load_digits

    images = torch.from_numpy(load_digits().data).float() / 8 - 1
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(_DIGITS_SPLIT_SEED))
    images = images[order]
    if dim == 784:
        square = images.view(-1, 1, 8, 8)
        images = F.interpolate(square, size=(28, 28), mode="bilinear", align_corners=False).flatten(1)
    name = "digits" if dim == 64 else "digits-784"
    return FiniteSet(name, images[:_DIGITS_FOR_TRAINING], images[_DIGITS_FOR_TRAINING:])


_MADE: dict[str, Callable[[], Dataset]] = {"8gaussians": eight_gaussians, "moons": moons, "checkerboard": checkerboard}
NAMES = (*_MADE, "digits", "digits-784")


def load(name: str, dim: int | None = None) -> Dataset:
    """Find a data set by name.

    Args:
        name: One of `NAMES`.
        dim: For `digits`, 64 or 784; None: what the name says. No other set has a choice.

    Returns:
        The data set.

    Raises:
        UsageError: If there is no such set, or not with this dimension.
    """
    if name not in NAMES:
        raise UsageError(f"--data {name!r} is unknown; choose one of: {', '.join(NAMES)}")
    natural = {"digits": 64, "digits-784": 784}.get(name, 2)
    if dim is not None and dim != natural and (name != "digits" or dim != 784):
        allowed = "64 or 784" if name == "digits" else str(natural)
        raise UsageError(f"--dim {dim} does not fit --data {name}; leave it out or give {allowed}")
    return _MADE[name]() if name in _MADE else digits(dim or natural)
