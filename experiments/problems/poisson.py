"""A physics-informed network for Poisson's equation on the unit square.

-Δu = f inside, u = 0 on the boundary, with u* = sin(πx) sin(πy) + ½ sin(3πx) sin(2πy), whence
f = 2π² sin(πx) sin(πy) + ½ 13π² sin(3πx) sin(2πy). The network is fitted to the equation at points of the inside and to
the boundary values at points of the boundary, on which it carries a soft penalty.

Source: Raissi, Perdikaris and Karniadakis 2019 (J. Comput. Phys. 378).
"""

import functools
import math
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from experiments.problems.base import Stream, loss_at_start
from experiments.problems.rows import FixedRows
from experiments.problems.seeding import seeded

_MODES = ((1.0, 1, 1), (0.5, 3, 2))  # amplitude, half waves along x, along y
_INTERIOR = 1024
_BOUNDARY = 256
_BOUNDARY_WEIGHT = 100.0
# The points are part of the problem and the same for every seed of a run, which then varies the initial weights.
_POINTS_SEED = 100
_GRID = 101  # points a side, for the error of the solution


def solution(points: Tensor) -> Tensor:
    """Give u*.

    Args:
        points: `[n, 2]`.

    Returns:
        Its values, `[n, 1]`.
    """
    return sum((_mode(points, *mode) for mode in _MODES), torch.zeros_like(points[:, :1]))


def source(points: Tensor) -> Tensor:
    """Give f = -Δu*.

    Args:
        points: `[n, 2]`.

    Returns:
        Its values, `[n, 1]`.
    """
    terms = (math.pi**2 * (mode[1] ** 2 + mode[2] ** 2) * _mode(points, *mode) for mode in _MODES)
    return sum(terms, torch.zeros_like(points[:, :1]))


def _mode(points: Tensor, amplitude: float, along_x: int, along_y: int) -> Tensor:
    x, y = (math.pi * points).split(1, dim=1)
    return amplitude * torch.sin(along_x * x) * torch.sin(along_y * y)


@dataclass(frozen=True)
class Inside:
    """Points of the inside.

    Attributes:
        points: `[n, 2]`.
        source: f there, `[n, 1]`.
    """

    points: Tensor
    source: Tensor

    def __len__(self) -> int:
        """Give the number of points."""
        return len(self.points)

    def __getitem__(self, rows: Tensor) -> "Inside":
        """Give the points of these indices."""
        return Inside(self.points[rows], self.source[rows])


@dataclass(frozen=True)
class Collocation:
    """The points of one step.

    Attributes:
        inside: Where the equation is asked for.
        boundary: Where u = 0 is asked for, `[m, 2]`.
    """

    inside: Inside
    boundary: Tensor


def unit_square(interior: int, boundary: int, generator: torch.Generator) -> Collocation:
    """Draw points uniformly.

    Args:
        interior: Points of the inside.
        boundary: Points of the boundary, an equal number a side up to one.
        generator: The source of randomness, on the CPU.

    Returns:
        The points, float32, on the CPU.
    """
    points = torch.rand(interior, 2, generator=generator)
    along = torch.rand(boundary, generator=generator)
    side = torch.arange(boundary) % 4
    across = (side % 2).to(along)
    x, y = torch.where(side < 2, along, across), torch.where(side < 2, across, along)
    return Collocation(Inside(points, source(points)), torch.stack([x, y], dim=1))


class SolutionMLP(nn.Module):
    """A tanh perceptron u(x, y), 2-64-64-64-1, with Glorot's weights and no bias at first, as in Raissi et al."""

    def __init__(self, width: int = 64, n_hidden: int = 3) -> None:
        """Build the layers; torch's own stream on the CPU gives the weights.

        Args:
            width: Of the hidden layers.
            n_hidden: Number of hidden layers.
        """
        super().__init__()
        widths = [2, *[width] * n_hidden]
        layers: list[nn.Module] = []
        for fan_in, fan_out in zip(widths, widths[1:], strict=False):
            layers += [nn.Linear(fan_in, fan_out), nn.Tanh()]
        self.net = nn.Sequential(*layers, nn.Linear(width, 1))
        for layer in self.net:
            if isinstance(layer, nn.Linear):
                nn.init.xavier_normal_(layer.weight)
                nn.init.zeros_(layer.bias)

    def forward(self, points: Tensor) -> Tensor:
        """Evaluate u.

        Args:
            points: `[n, 2]`.

        Returns:
            Its values, `[n, 1]`.
        """
        return self.net(points)


def residual(model: nn.Module, inside: Inside) -> Tensor:
    """Give -Δu - f, differentiable in the parameters.

    Args:
        model: u, evaluated point by point.
        inside: n points with f.

    Returns:
        The residual, `[n, 1]`.
    """
    with torch.enable_grad():  # the derivatives in x are part of the value, also where none in the parameters is wanted
        x = inside.points.detach().clone().requires_grad_()
        (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        columns = slope.unbind(1)
        curvature = [
            torch.autograd.grad(column.sum(), x, create_graph=True)[0][:, axis] for axis, column in enumerate(columns)
        ]
        return -sum(curvature[1:], curvature[0]).unsqueeze(1) - inside.source


class CollocationStream:
    """Epochs over the points of the inside and of the boundary, each drawn in proportion to their number."""

    def __init__(self, points: Collocation, seed: int, device: torch.device | str = "cpu") -> None:
        """Start before the first epoch.

        Args:
            points: All points.
            seed: Fixes both orders.
            device: Where the points live.
        """
        self._points = points
        self._inside = FixedRows(points.inside, seed, device)
        self._boundary = FixedRows(points.boundary, seed + 1, device)

    def draw(self, n: int) -> Collocation:
        """Take the next points.

        Args:
            n: How many of both kinds together.

        Returns:
            The points, at least one of the boundary; all, and the very same tensors, if n is at least their number.

        Raises:
            ValueError: If n leaves no room for one point of each kind.
        """
        if n < 2:
            raise ValueError(f"n={n} has no room for a point of the inside and one of the boundary; give at least 2")
        rows = len(self._points.inside) + len(self._points.boundary)
        if n >= rows:
            return self._points
        boundary = max(1, n * len(self._points.boundary) // rows)
        return Collocation(self._inside.draw(n - boundary), self._boundary.draw(boundary))


@dataclass(frozen=True)
class Poisson:
    """1024 fixed points of the inside and 256 of the boundary, whose mean square is weighed by 100.

    Attributes:
        points: The points, on the device.
        device: Where the training runs.
    """

    points: Collocation
    device: torch.device

    @classmethod
    def of(cls, device: torch.device) -> Self:
        """Draw the points.

        Args:
            device: Where the training runs.

        Returns:
            The problem.
        """
        points = unit_square(_INTERIOR, _BOUNDARY, torch.Generator().manual_seed(_POINTS_SEED))
        inside = Inside(points.inside.points.to(device), points.inside.source.to(device))
        return cls(Collocation(inside, points.boundary.to(device)), device)

    @property
    def name(self) -> str:
        """Poisson."""
        return "poisson"

    @property
    def score(self) -> str:
        """The loss on all points: what an optimizer is asked to lower."""
        return "train_objective"

    @property
    def rows(self) -> int | None:
        """Number of points, of both kinds together."""
        return len(self.points.inside) + len(self.points.boundary)

    @property
    def dim(self) -> int:
        """Number of coordinates."""
        return 2

    @property
    def outputs(self) -> int:
        """The residual at a point of the inside, or the value at one of the boundary."""
        return 1

    @functools.cached_property
    def first_loss(self) -> float:
        """The loss at initial weights, on the first rows."""
        return loss_at_start(self)

    def initial_model(self, seed: int) -> nn.Module:
        """Make the network.

        Args:
            seed: Fixes the weights.

        Returns:
            The network, on the device.
        """
        return seeded(SolutionMLP, seed, self.device)

    def stream(self, seed: int) -> Stream:
        """Start the first epoch.

        Args:
            seed: Fixes the order of the points.

        Returns:
            The stream, at its beginning.
        """
        return CollocationStream(self.points, seed, self.device)

    def loss(self, model: nn.Module, batch: Collocation) -> Tensor:
        """Give mean (-Δu - f)² inside plus 100 times mean u² on the boundary.

        Residual and boundary values are marked as the outputs on which a Gauss-Newton matrix is built: no module
        returns the former. Only `HessianFree` notices.

        Args:
            model: u.
            batch: The points.

        Returns:
            A scalar with its graph.
        """
        from hessfree import mark_outputs

        equation, boundary = mark_outputs((residual(model, batch.inside), model(batch.boundary)))
        return equation.square().mean() + _BOUNDARY_WEIGHT * boundary.square().mean()

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Judge the network by its objective and by the solution.

        Args:
            model: u.

        Returns:
            `train_objective`, the loss on all points, and `relative_error`, |u - u*| / |u*| on a grid of 101 x 101.
        """
        axis = torch.linspace(0, 1, _GRID, device=self.device)
        grid = torch.cartesian_prod(axis, axis)
        exact = solution(grid)
        with torch.no_grad():
            error = torch.linalg.vector_norm(model(grid) - exact) / torch.linalg.vector_norm(exact)
        return {"train_objective": self.loss(model, self.points).item(), "relative_error": error.item()}
