"""Flow matching with a `ToyMLP`: the raw target x1 - x0, a target with less noise, and fixed rows without noise."""

import functools
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from experiments import flow_matching
from experiments.data import Dataset
from experiments.flow_matching import Batch, BatchStream, Evaluation, sample_batch
from experiments.models import ToyMLP
from experiments.problems.base import Stream
from experiments.problems.rows import FixedRows
from experiments.problems.seeding import seeded
from experiments.stable_target import stable_target

_FIXED_ROWS = 4096
# The fixed rows are part of the problem and the same for every seed of a run, which then varies the initial weights.
_FIXED_SEED = 100
_FLOOR_SEED = 54321
_FLOOR_ROWS = 16384


@dataclass(frozen=True)
class _VelocityField:
    """What all kinds of flow matching share.

    Attributes:
        dataset: The data.
        evaluation: The fixed points of judgement.
        device: Where the training runs.
    """

    dataset: Dataset
    evaluation: Evaluation
    device: torch.device

    @property
    def dim(self) -> int:
        """Number of components D of a point."""
        return self.dataset.dim

    def initial_model(self, seed: int) -> nn.Module:
        """Make the network.

        Args:
            seed: Fixes the weights.

        Returns:
            The network, on the device.
        """
        return seeded(lambda: ToyMLP(self.dim, time_varying=True), seed, self.device)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Give mean (v - u)² over rows and components.

        Args:
            model: The network.
            batch: n rows.

        Returns:
            A scalar with its graph.
        """
        return flow_matching.loss(model, batch)


@dataclass(frozen=True)
class FlowMatching(_VelocityField):
    """The raw target x1 - x0 on rows that never end, as everyone trains it."""

    @classmethod
    def of(cls, dataset: Dataset, device: torch.device) -> Self:
        """Set up the points of judgement.

        Args:
            dataset: The data.
            device: Where the training runs.

        Returns:
            The problem.
        """
        return cls(dataset, Evaluation.of(dataset, device), device)

    @property
    def name(self) -> str:
        """The data set's name."""
        return self.dataset.name

    @property
    def score(self) -> str:
        """The figure that suits the data set."""
        return self.dataset.score

    @property
    def rows(self) -> int | None:
        """No row comes twice."""
        return None

    @property
    def noise_floor(self) -> float:
        """The mean square of the target's noise, below which no training loss stays."""
        return self.evaluation.noise_floor

    def stream(self, seed: int) -> Stream:
        """Start the sequence of training rows.

        Args:
            seed: Fixes the sequence.

        Returns:
            The stream, at its beginning.
        """
        return BatchStream(self.dataset, seed, self.device)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Judge the network on fixed points.

        Args:
            model: The network.

        Returns:
            `excess_loss` and `holdout_loss`, see `Evaluation`; the same for every target.
        """
        return self.evaluation.losses(model)


@dataclass(frozen=True)
class StableFlowMatching(FlowMatching):
    """The same points, times and data as `FlowMatching` for a seed, with the Rao-Blackwellised target."""

    @property
    def name(self) -> str:
        """The data set's name with the target's."""
        return f"{self.dataset.name}-stable"

    @functools.cached_property
    def noise_floor(self) -> float:
        """The mean square of this target's noise, estimated on 16384 rows of their own."""
        rows = stable_target(sample_batch(self.dataset, _FLOOR_ROWS, torch.Generator().manual_seed(_FLOOR_SEED)))
        return (rows.u - self.dataset.conditional_expectation(rows.x_t, rows.t)).square().mean().item()

    def stream(self, seed: int) -> Stream:
        """Start the sequence of training rows.

        Args:
            seed: Fixes the sequence.

        Returns:
            The stream, at its beginning.
        """
        return BatchStream(self.dataset, seed, self.device, stable_target)


@dataclass(frozen=True)
class FixedFlowMatching(_VelocityField):
    """4096 rows (x_t, t) drawn once, whose target is E[u | x_t, t] itself: a regression without any noise.

    Attributes:
        fixed: The rows, on the device; the same for every seed.
    """

    fixed: Batch

    @classmethod
    def of(cls, dataset: Dataset, device: torch.device) -> Self:
        """Draw the rows, and set up the points of judgement.

        Args:
            dataset: The data.
            device: Where the training runs.

        Returns:
            The problem.
        """
        rows = sample_batch(dataset, _FIXED_ROWS, torch.Generator().manual_seed(_FIXED_SEED))
        exact = Batch(rows.x_t, rows.t, dataset.conditional_expectation(rows.x_t, rows.t))
        return cls(dataset, Evaluation.of(dataset, device), device, exact.to(device))

    @property
    def name(self) -> str:
        """The data set's name with the kind of rows."""
        return f"{self.dataset.name}-fixed"

    @property
    def score(self) -> str:
        """The loss on the rows themselves: how far optimization came, whatever it says of other points."""
        return "fixed_excess"

    @property
    def rows(self) -> int | None:
        """Number of rows."""
        return len(self.fixed)

    def stream(self, seed: int) -> Stream:
        """Start the first epoch.

        Args:
            seed: Fixes the order of the rows.

        Returns:
            The stream, at its beginning.
        """
        return FixedRows(self.fixed, seed, self.device)

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Judge the network on its rows and on other points.

        Args:
            model: The network.

        Returns:
            `fixed_excess`, mean (v - E[u | x_t, t])² on the rows, and `excess_loss`, the same on fresh points.
        """
        return {
            "fixed_excess": self.loss(model, self.fixed).item(),
            "excess_loss": self.evaluation.excess_loss(model),
        }
