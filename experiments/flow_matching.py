"""Conditional flow matching: batches, the loss, and two losses on fixed points.

A standard normal x0 and a data point x1 are joined by a path with velocity u = x1 - x0 (`experiments.paths`). A network
v(x_t, t) is fitted to u; the best it can do is E[u | x_t, t], the velocity that carries the normal into the data.
Source: Lipman et al. 2023 (arXiv 2210.02747) and Tong et al. 2024 (arXiv 2302.00482).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from experiments.data import Dataset
from experiments.paths import STRAIGHT, Batch, Paths

__all__ = ["Batch", "BatchStream", "Evaluation", "Field", "Paths", "loss", "sample_batch"]

Field = Callable[[Tensor, Tensor], Tensor]  # (x [n, D], t [n, 1] or a scalar tensor) -> velocity [n, D]

_BLOCK = 8192
# The points of an evaluation are the same for every optimizer and every seed of a run.
_EVALUATION_SEED = 12345
_EVALUATION_POINTS_2D = 16384
_EVALUATION_POINTS = 4096


def sample_batch(
    dataset: Dataset,
    n: int,
    generator: torch.Generator,
    device: torch.device | str = "cpu",
    paths: Paths = STRAIGHT,
) -> Batch:
    """Draw a training batch.

    Args:
        dataset: Where x1 comes from.
        n: Number of rows.
        generator: The source of all randomness, on the CPU: every device gets the same numbers.
        device: Where the batch shall live.
        paths: Between noise and data.

    Returns:
        The batch of n rows.
    """
    return paths.join(dataset.sample(n, generator), generator).to(device)


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
        paths: Paths = STRAIGHT,
    ) -> None:
        """Start the sequence.

        Args:
            dataset: Where x1 comes from.
            seed: Fixes the sequence.
            device: Where the batches shall live.
            target: Replaces the target x1 - x0 in a block of 8192 rows, on the CPU; None: leaves it.
            paths: Between noise and data.
        """
        self._dataset = dataset
        self._paths = paths
        self._target = target
        self._generator = torch.Generator().manual_seed(seed)
        self._device = device
        self._block: Batch | None = None
        self._position = 0
        self._before_block = self._generator.get_state()

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
                self._block = self._next_block()
                self._position = 0
            part = self._block[self._position : self._position + missing]
            self._position += len(part)
            missing -= len(part)
            parts.append(part)
        if len(parts) == 1:
            return parts[0]
        return Batch(*(torch.cat([getattr(part, name) for part in parts]) for name in ("x_t", "t", "u")))

    def _next_block(self) -> Batch:
        self._before_block = self._generator.get_state()
        block = sample_batch(self._dataset, _BLOCK, self._generator, paths=self._paths)
        return (block if self._target is None else self._target(block)).to(self._device)

    def state_dict(self) -> dict[str, Any]:
        """Give the place in the sequence: from what the current block was drawn, and how much of it is used."""
        return {"before_block": self._before_block, "position": self._position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a place in the sequence.

        Args:
            state: From the `state_dict` of a stream with the same data, paths and target.
        """
        self._generator.set_state(state["before_block"])
        self._position = state["position"]
        self._block = self._next_block() if self._position else None


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
    """Fixed points on which every optimizer is judged, at uniform times whatever the times of the training.

    Attributes:
        points: Rows of the training distribution.
        expectation: E[u | x_t, t] at these points, `[n, D]`; None where it has no closed form, or a very dear one.
        held_out: Rows made of data that training never sees.
        noise_floor: mean (u - E[u | x_t, t])² over `points`: what no network can go below in its training loss. NaN
            where the expectation is not known.
        sigma: Of the paths' own noise.
    """

    points: Batch
    expectation: Tensor | None
    held_out: Batch
    noise_floor: float
    sigma: float = 0.0

    @classmethod
    def of(
        cls, dataset: Dataset, device: torch.device | str = "cpu", n: int | None = None, paths: Paths = STRAIGHT
    ) -> "Evaluation":
        """Draw the points of a data set.

        Args:
            dataset: The data.
            device: Where the points shall live.
            n: Number of points of each kind; None: 16384 in two dimensions, 4096 in more.
            paths: Between noise and data.

        Returns:
            The points; the same at every call.
        """
        if n is None:
            n = _EVALUATION_POINTS_2D if dataset.dim == 2 else _EVALUATION_POINTS
        uniform = replace(paths, times="uniform")
        generator = torch.Generator().manual_seed(_EVALUATION_SEED)
        points = sample_batch(dataset, n, generator, paths=uniform)
        held_out = uniform.join(dataset.holdout(n, generator), generator).to(device)
        if not (paths.independent and dataset.knows_expectation):
            return cls(points.to(device), None, held_out, math.nan, paths.sigma)
        expectation = dataset.conditional_expectation(points.x_t, points.t, paths.sigma)
        floor = (points.u - expectation).square().mean().item()
        return cls(points.to(device), expectation.to(device), held_out, floor, paths.sigma)

    def losses(self, field: Field) -> dict[str, float]:
        """Give both figures.

        Args:
            field: The velocity field v(x, t).

        Returns:
            `excess_loss`, where the expectation is known, and `holdout_loss`.
        """
        excess = {} if self.expectation is None else {"excess_loss": self.excess_loss(field)}
        return excess | {"holdout_loss": self.holdout_loss(field)}

    @torch.no_grad()
    def excess_loss(self, field: Field) -> float:
        """Give mean (v - E[u | x_t, t])² over points and components.

        The expected training loss is this plus the noise floor, so this is what training can improve.

        Args:
            field: The velocity field v(x, t).

        Returns:
            The excess loss, 0 for the exact field; NaN where the expectation is not known.
        """
        if self.expectation is None:
            return math.nan
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
