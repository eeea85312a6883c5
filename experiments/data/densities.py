"""Densities in two dimensions that points are drawn from without end, E[u | x_t, t] of their paths in closed form."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from experiments.data.base import Score
from experiments.posteriors import mixture_velocity, squares_velocity


class _Endless(ABC):
    """A density in closed form, of which every draw is new.

    Attributes:
        score: The excess loss, which is known exactly here.
        knows_expectation: It is in closed form.
    """

    score: ClassVar[Score] = "excess_loss"
    knows_expectation: ClassVar[bool] = True

    @abstractmethod
    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """Draw points `[n, D]`."""

    def holdout(self, n: int, generator: torch.Generator) -> Tensor:
        """Draw points: as new to training as `sample`'s, and drawn as they are.

        Args:
            n: How many.
            generator: The source of randomness, on the CPU.

        Returns:
            Points, `[n, D]`, float32.
        """
        return self.sample(n, generator)


@dataclass(frozen=True)
class GaussianMixture(_Endless):
    """Equally likely Gaussians with one spherical variance.

    Attributes:
        name: The name on the command line.
        means: Centres, `[K, D]`, float64.
        variance: Variance of each component along each axis.
    """

    name: str
    means: Tensor
    variance: float

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

    def conditional_expectation(self, x_t: Tensor, t: Tensor, sigma: float = 0.0) -> Tensor:
        """Give E[u | x_t, t] in closed form.

        Args:
            x_t: Points on the path, `[n, D]`.
            t: Their times, `[n, 1]`, `[n]` or one for all.
            sigma: Standard deviation of the path's own noise.

        Returns:
            The expectation, `[n, D]`, like `x_t`.
        """
        return mixture_velocity(x_t, t, self.means, self.variance, sigma)


@dataclass(frozen=True)
class UniformSquares(_Endless):
    """A uniform distribution over equal squares (cubes, if D > 2).

    Attributes:
        name: The name on the command line.
        corners: The lowest corner of each square, `[K, D]`, float64.
        side: Length of a side.
    """

    name: str
    corners: Tensor
    side: float

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

    def conditional_expectation(self, x_t: Tensor, t: Tensor, sigma: float = 0.0) -> Tensor:
        """Give E[u | x_t, t] in closed form.

        Args:
            x_t: Points on the path, `[n, D]`.
            t: Their times, `[n, 1]`, `[n]` or one for all.
            sigma: Standard deviation of the path's own noise.

        Returns:
            The expectation, `[n, D]`, like `x_t`.
        """
        return squares_velocity(x_t, t, self.corners, self.side, sigma)


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
