"""Flow matching with a `ToyMLP`: the raw target x1 - x0, a target with less noise, and fixed rows without noise."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, Self, get_args

import torch
from torch import Tensor, nn

from experiments import flow_matching
from experiments.data import Dataset
from experiments.environment import UsageError
from experiments.flow_matching import Batch, BatchStream, Evaluation, sample_batch
from experiments.models import ToyMLP
from experiments.paths import STRAIGHT, Paths
from experiments.problems.base import Stream, loss_at_start
from experiments.problems.rows import FixedRows
from experiments.problems.seeding import seeded
from experiments.stable_target import stable_target

Target = Literal["raw", "stable", "fixed"]
TARGETS: tuple[str, ...] = get_args(Target)

_FIXED_ROWS = 4096
# The fixed rows are part of the problem and the same for every seed of a run, which then varies the initial weights.
_FIXED_SEED = 100
_FLOOR_SEED = 54321
_FLOOR_ROWS = 16384
_WIDTH = 64
_LAYERS = 3


@dataclass(frozen=True)
class _VelocityField:
    """What all kinds of flow matching share.

    Attributes:
        dataset: The data.
        evaluation: The fixed points of judgement.
        device: Where the training runs.
        width: Of the network's hidden layers.
        n_hidden: Number of these.
    """

    dataset: Dataset
    evaluation: Evaluation
    device: torch.device
    width: int = field(default=_WIDTH, kw_only=True)
    n_hidden: int = field(default=_LAYERS, kw_only=True)

    @property
    def dim(self) -> int:
        """Number of components D of a point."""
        return self.dataset.dim

    @property
    def outputs(self) -> int:
        """A velocity has as many components as a point."""
        return self.dataset.dim

    @property
    def _network(self) -> str:
        """What an unusual network adds to the name: other networks' results go to other places."""
        width = "" if self.width == _WIDTH else f"-w{self.width}"
        return width if self.n_hidden == _LAYERS else f"{width}-l{self.n_hidden}"

    def initial_model(self, seed: int) -> nn.Module:
        """Make the network.

        Args:
            seed: Fixes the weights.

        Returns:
            The network, on the device.
        """
        return seeded(
            lambda: ToyMLP(self.dim, w=self.width, n_hidden=self.n_hidden, time_varying=True), seed, self.device
        )

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
    """The raw target x1 - x0 on rows that never end, as everyone trains it.

    Attributes:
        paths: Between noise and data.
    """

    paths: Paths = field(default=STRAIGHT, kw_only=True)

    @classmethod
    def of(
        cls,
        dataset: Dataset,
        device: torch.device,
        *,
        paths: Paths = STRAIGHT,
        width: int = _WIDTH,
        n_hidden: int = _LAYERS,
    ) -> Self:
        """Set up the points of judgement.

        Args:
            dataset: The data.
            device: Where the training runs.
            paths: Between noise and data.
            width: Of the network's hidden layers.
            n_hidden: Number of these.

        Returns:
            The problem.
        """
        evaluation = Evaluation.of(dataset, device, paths=paths)
        return cls(dataset, evaluation, device, paths=paths, width=width, n_hidden=n_hidden)

    @property
    def name(self) -> str:
        """The data set's name, with what is unusual of the network and of the paths."""
        return f"{self.dataset.name}{self._network}{self.paths.suffix}"

    @property
    def score(self) -> str:
        """The figure that suits the data set; where the exact field is not known, the loss on held-out rows."""
        return self.dataset.score if self.paths.independent else "holdout_loss"

    @property
    def rows(self) -> int | None:
        """No row comes twice."""
        return None

    @functools.cached_property
    def noise_floor(self) -> float:
        """The mean square of the target's noise, below which no training loss stays; NaN where it is not known."""
        usual = self.paths.times == "uniform" or self.evaluation.expectation is None
        return self.evaluation.noise_floor if usual else self._noise_of(lambda batch: batch)

    def _noise_of(self, target: Callable[[Batch], Batch]) -> float:
        """Estimate the noise of a target on 16384 rows of their own."""
        generator = torch.Generator().manual_seed(_FLOOR_SEED)
        rows = target(sample_batch(self.dataset, _FLOOR_ROWS, generator, paths=self.paths))
        exact = self.dataset.conditional_expectation(rows.x_t, rows.t, self.paths.sigma)
        return (rows.u - exact).square().mean().item()

    @functools.cached_property
    def first_loss(self) -> float:
        """The loss at initial weights, on the first rows."""
        return loss_at_start(self)

    def stream(self, seed: int) -> Stream:
        """Start the sequence of training rows.

        Args:
            seed: Fixes the sequence.

        Returns:
            The stream, at its beginning.
        """
        return BatchStream(self.dataset, seed, self.device, paths=self.paths)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Judge the network on fixed points.

        Args:
            model: The network.

        Returns:
            What `Evaluation.losses` says; the same for every target.
        """
        return self.evaluation.losses(model)


@dataclass(frozen=True)
class StableFlowMatching(FlowMatching):
    """The same points, times and data as `FlowMatching` for a seed, with the Rao-Blackwellised target."""

    def __post_init__(self) -> None:
        """Check that the target is unbiased on these paths.

        Raises:
            UsageError: If noise and data are coupled, or a path has noise of its own.
        """
        if not self.paths.independent or self.paths.sigma:
            raise UsageError(
                f"--target stable is unbiased for independent pairs and straight paths alone, and these are "
                f"--coupling {self.paths.coupling} --sigma {self.paths.sigma:g}; take --target raw"
            )

    @property
    def name(self) -> str:
        """The data set's name with the target's."""
        return f"{self.dataset.name}-stable{self._network}{self.paths.suffix}"

    @functools.cached_property
    def noise_floor(self) -> float:
        """The mean square of this target's noise."""
        return self._noise_of(stable_target) if self.dataset.knows_expectation else math.nan

    def stream(self, seed: int) -> Stream:
        """Start the sequence of training rows.

        Args:
            seed: Fixes the sequence.

        Returns:
            The stream, at its beginning.
        """
        return BatchStream(self.dataset, seed, self.device, stable_target, self.paths)


@dataclass(frozen=True)
class FixedFlowMatching(_VelocityField):
    """4096 rows (x_t, t) drawn once, whose target is E[u | x_t, t] itself: a regression without any noise.

    Attributes:
        fixed: The rows, on the device; the same for every seed.
    """

    fixed: Batch

    @classmethod
    def of(cls, dataset: Dataset, device: torch.device, *, width: int = _WIDTH, n_hidden: int = _LAYERS) -> Self:
        """Draw the rows, and set up the points of judgement.

        Args:
            dataset: The data.
            device: Where the training runs.
            width: Of the network's hidden layers.
            n_hidden: Number of these.

        Returns:
            The problem.

        Raises:
            UsageError: If the exact target is too dear for these data.
        """
        if not dataset.knows_expectation:
            raise UsageError(
                f"--target fixed needs E[u | x_t, t], which {dataset.name} does not offer; take --target raw"
            )
        rows = sample_batch(dataset, _FIXED_ROWS, torch.Generator().manual_seed(_FIXED_SEED))
        exact = Batch(rows.x_t, rows.t, dataset.conditional_expectation(rows.x_t, rows.t))
        evaluation = Evaluation.of(dataset, device)
        return cls(dataset, evaluation, device, exact.to(device), width=width, n_hidden=n_hidden)

    @property
    def name(self) -> str:
        """The data set's name with the kind of rows, and what is unusual of the network."""
        return f"{self.dataset.name}-fixed{self._network}"

    @property
    def score(self) -> str:
        """The loss on the rows themselves: how far optimization came, whatever it says of other points."""
        return "fixed_excess"

    @property
    def rows(self) -> int | None:
        """Number of rows."""
        return len(self.fixed)

    @functools.cached_property
    def first_loss(self) -> float:
        """The loss at initial weights, on the first rows."""
        return loss_at_start(self)

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


Flow = FlowMatching | FixedFlowMatching


def make_flow(
    target: Target,
    dataset: Dataset,
    device: torch.device,
    *,
    paths: Paths = STRAIGHT,
    width: int = _WIDTH,
    n_hidden: int = _LAYERS,
) -> Flow:
    """Set up flow matching with one of the targets.

    Args:
        target: Which.
        dataset: The data.
        device: Where the training runs.
        paths: Between noise and data.
        width: Of the network's hidden layers.
        n_hidden: Number of these.

    Returns:
        The problem.

    Raises:
        UsageError: If the target is not there for these data or paths.
    """
    if target == "fixed":
        if paths != STRAIGHT:
            raise UsageError(f"--target fixed draws its rows on straight paths, not on {paths}; take --target raw")
        return FixedFlowMatching.of(dataset, device, width=width, n_hidden=n_hidden)
    kind = StableFlowMatching if target == "stable" else FlowMatching
    return kind.of(dataset, device, paths=paths, width=width, n_hidden=n_hidden)
