"""Flow matching on a stream of rows that never end: the raw target x1 - x0, as everyone trains it."""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from experiments import flow_matching
from experiments.data import Dataset
from experiments.flow_matching import Batch, BatchStream, Evaluation
from experiments.models import ToyMLP
from experiments.problems.seeding import seeded


@dataclass(frozen=True)
class FlowMatching:
    """A `ToyMLP` that learns the velocity of a data set's paths.

    Attributes:
        dataset: The data.
        evaluation: The fixed points of judgement.
        device: Where the training runs.
    """

    dataset: Dataset
    evaluation: Evaluation
    device: torch.device

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
    def dim(self) -> int:
        """Number of components D of a point."""
        return self.dataset.dim

    @property
    def noise_floor(self) -> float:
        """The mean square of the target's noise, below which no training loss stays."""
        return self.evaluation.noise_floor

    def initial_model(self, seed: int) -> nn.Module:
        """Make the network.

        Args:
            seed: Fixes the weights.

        Returns:
            The network, on the device.
        """
        with seeded(seed):
            model = ToyMLP(self.dim, time_varying=True)
        return model.to(self.device)

    def stream(self, seed: int) -> BatchStream:
        """Start the sequence of training rows.

        Args:
            seed: Fixes the sequence.

        Returns:
            The stream, at its beginning.
        """
        return BatchStream(self.dataset, seed, self.device)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Give mean (v - u)² over rows and components.

        Args:
            model: The network.
            batch: n rows.

        Returns:
            A scalar with its graph.
        """
        return flow_matching.loss(model, batch)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Judge the network on fixed points.

        Args:
            model: The network.

        Returns:
            `excess_loss` and `holdout_loss`, see `Evaluation`.
        """
        return self.evaluation.losses(model)
