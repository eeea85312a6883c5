"""Conditional flow matching: batches, the loss, a generator of samples, and two losses on fixed points.

A standard normal x0 and a data point x1 are joined by x_t = (1-t) x0 + t x1, whose velocity is u = x1 - x0. A network
v(x_t, t) is fitted to u; the best it can do is E[u | x_t, t], the velocity that carries the normal into the data.
Source: Lipman et al. 2023 (arXiv 2210.02747) and Tong et al. 2024 (arXiv 2302.00482, independent coupling, sigma = 0).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from experiments.data import Dataset

Field = Callable[[Tensor, Tensor], Tensor]  # (x [n, D], t [n, 1] or a scalar tensor) -> velocity [n, D]

_BLOCK = 8192
# The points of an evaluation are the same for every optimizer and every seed of a run.
_EVALUATION_SEED = 12345
_EVALUATION_POINTS_2D = 16384
_EVALUATION_POINTS = 4096


@dataclass(frozen=True)
class Batch:
    """Points on conditional paths with the velocity to learn.

    Attributes:
        x_t: Points, `[n, D]`.
        t: Their times, `[n, 1]`, uniform on [0, 1).
        u: Velocities to learn, `[n, D]`: x1 - x0 of the path that passes there, unless a function says otherwise.
    """

    x_t: Tensor
    t: Tensor
    u: Tensor

    def __len__(self) -> int:
        """Give the number of points."""
        return len(self.x_t)

    def __getitem__(self, rows: slice | Tensor) -> "Batch":
        """Give some of the rows, for a slice as views."""
        return Batch(self.x_t[rows], self.t[rows], self.u[rows])

    def to(self, device: torch.device | str) -> "Batch":
        """Copy the rows, where they live elsewhere.

        Args:
            device: Where they shall live.

        Returns:
            The rows there.
        """
        return Batch(self.x_t.to(device), self.t.to(device), self.u.to(device))


def join(x1: Tensor, generator: torch.Generator, device: torch.device | str = "cpu") -> Batch:
    """Join data points with normal noise at uniform times.

    Args:
        x1: Data points, `[n, D]`, on the CPU.
        generator: Draws the noise and the times, on the CPU.
        device: Where the batch shall live.

    Returns:
        The batch of n rows.
    """
    x0 = torch.randn(x1.shape, generator=generator)
    t = torch.rand(len(x1), 1, generator=generator)
    return Batch(torch.lerp(x0, x1, t), t, x1 - x0).to(device)


def sample_batch(dataset: Dataset, n: int, generator: torch.Generator, device: torch.device | str = "cpu") -> Batch:
    """Draw a training batch.

    Args:
        dataset: Where x1 comes from.
        n: Number of rows.
        generator: The source of all randomness, on the CPU: every device gets the same numbers.
        device: Where the batch shall live.

    Returns:
        The batch of n rows.
    """
    return join(dataset.sample(n, generator), generator, device)


class BatchStream:
    """An endless sequence of training rows, the same for a seed however it is cut into batches.

    Rows are drawn in blocks of fixed size and handed out in order. An optimizer with batches of 256 thus sees the very
    rows, noise included, that one with batches of 8192 sees; and small batches do not pay for many small draws.
    """

    def __init__(
        self,
        dataset: Dataset,
        seed: int,
        device: torch.device | str = "cpu",
        target: Callable[[Batch], Batch] | None = None,
    ) -> None:
        """Start the sequence.

        Args:
            dataset: Where x1 comes from.
            seed: Fixes the sequence.
            device: Where the batches shall live.
            target: Replaces the target x1 - x0 in a block of 8192 rows, on the CPU; None: leaves it.
        """
        self._dataset = dataset
        self._target = target
        self._generator = torch.Generator().manual_seed(seed)
        self._device = device
        self._block: Batch | None = None
        self._position = 0

    def draw(self, n: int) -> Batch:
        """Take the next rows.

        Args:
            n: How many.

        Returns:
            The batch of n rows.
        """
        parts: list[Batch] = []
        missing = n
        while missing:
            if self._block is None or self._position == _BLOCK:
                block = sample_batch(self._dataset, _BLOCK, self._generator)
                self._block = (block if self._target is None else self._target(block)).to(self._device)
                self._position = 0
            part = self._block[self._position : self._position + missing]
            self._position += len(part)
            missing -= len(part)
            parts.append(part)
        if len(parts) == 1:
            return parts[0]
        return Batch(*(torch.cat([getattr(part, name) for part in parts]) for name in ("x_t", "t", "u")))


def loss(field: Field, batch: Batch) -> Tensor:
    """Give the flow-matching loss, mean (v - u)² over rows and components.

    Args:
        field: The velocity field v(x, t).
        batch: n rows.

    Returns:
        A scalar with its graph.
    """
    return (field(batch.x_t, batch.t) - batch.u).square().mean()


@dataclass(frozen=True)
class Evaluation:
    """Fixed points on which every optimizer is judged.

    Attributes:
        points: Rows of the training distribution.
        expectation: E[u | x_t, t] at these points, `[n, D]`.
        held_out: Rows made of data that training never sees.
        noise_floor: mean (u - E[u | x_t, t])² over `points`: what no network can go below in its training loss.
    """

    points: Batch
    expectation: Tensor
    held_out: Batch
    noise_floor: float

    @classmethod
    def of(cls, dataset: Dataset, device: torch.device | str = "cpu", n: int | None = None) -> "Evaluation":
        """Draw the points of a data set.

        Args:
            dataset: The data.
            device: Where the points shall live.
            n: Number of points of each kind; None: 16384 in two dimensions, 4096 in more.

        Returns:
            The points; the same at every call.
        """
        if n is None:
            n = _EVALUATION_POINTS_2D if dataset.dim == 2 else _EVALUATION_POINTS
        generator = torch.Generator().manual_seed(_EVALUATION_SEED)
        points = sample_batch(dataset, n, generator)
        held_out = join(dataset.holdout(n, generator), generator, device)
        expectation = dataset.conditional_expectation(points.x_t, points.t)
        floor = (points.u - expectation).square().mean().item()
        return cls(points.to(device), expectation.to(device), held_out, floor)

    def losses(self, field: Field) -> dict[str, float]:
        """Give both figures.

        Args:
            field: The velocity field v(x, t).

        Returns:
            `excess_loss` and `holdout_loss`.
        """
        return {"excess_loss": self.excess_loss(field), "holdout_loss": self.holdout_loss(field)}

    @torch.no_grad()
    def excess_loss(self, field: Field) -> float:
        """Give mean (v - E[u | x_t, t])² over points and components.

        The expected training loss is this plus the noise floor, so this is what training can improve.

        Args:
            field: The velocity field v(x, t).

        Returns:
            The excess loss, 0 for the exact field.
        """
        return (field(self.points.x_t, self.points.t) - self.expectation).square().mean().item()

    @torch.no_grad()
    def holdout_loss(self, field: Field) -> float:
        """Give the flow-matching loss on held-out data with fixed noise and times.

        Args:
            field: The velocity field v(x, t).

        Returns:
            The loss, mean over points and components.
        """
        return loss(field, self.held_out).item()


@torch.no_grad()
def generate(
    field: Field,
    n: int,
    dim: int,
    generator: torch.Generator,
    *,
    steps: int = 50,
    method: Literal["euler", "midpoint", "rk4"] = "midpoint",
    device: torch.device | str = "cpu",
) -> Tensor:
    """Carry normal noise along the field from t = 0 to t = 1 in equal steps (torchdiffeq does the solving).

    Args:
        field: The velocity field v(x, t).
        n: Number of samples.
        dim: Their dimension D.
        generator: Draws the noise, on the CPU.
        steps: Number of steps; a midpoint step evaluates the field twice, an RK4 step four times.
        method: The rule of a step.
        device: Where the field lives.

    Returns:
        Samples, `[n, dim]`, on `device`.

    Raises:
        ValueError: If `steps` is not positive.
    """
    if steps < 1:
        raise ValueError(f"steps={steps} does not lead from t = 0 to t = 1; give a positive number")
    from torchdiffeq import odeint

    x0 = torch.randn(n, dim, generator=generator).to(device)
    times = torch.linspace(0, 1, steps + 1, device=device)
    return odeint(lambda t, x: field(x, t), x0, times, method=method)[-1]
