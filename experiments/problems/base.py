"""What the comparison asks of a problem: initial weights, rows, a loss, and figures to be judged by.

Nothing here knows flow matching, nor any optimizer; the training loop and the optimizers' settings know nothing else of
a problem than this.
"""

from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn


class Stream(Protocol):
    """A sequence of training rows."""

    def draw(self, n: int) -> Any:
        """Take the next n rows, in whatever form the problem's loss takes them."""


class Problem(Protocol):
    """What all optimizers of a comparison share."""

    @property
    def name(self) -> str:
        """The name in tables, figures and on the command line."""

    @property
    def score(self) -> str:
        """The key of `evaluate` by which optimizers are compared; lower is better."""

    @property
    def device(self) -> torch.device:
        """Where the training runs."""

    @property
    def rows(self) -> int | None:
        """Number of fixed rows, which every step with as many or more sees all, unchanged; None: new rows for ever."""

    @property
    def dim(self) -> int:
        """Number of components of a data point, or of the network's input where that is no point on a path."""

    def initial_model(self, seed: int) -> nn.Module:
        """Make the network, its weights fixed by the seed alone: not by the device, nor by torch's own stream."""

    def stream(self, seed: int) -> Stream:
        """Start the sequence of training rows, at its beginning, in an order that depends on the seed alone."""

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Give the training loss on rows of the stream, a scalar with its graph."""

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Give the figures of judgement, the same keys every time; the rows behind them do not depend on a seed."""


@runtime_checkable
class Noisy(Protocol):
    """A problem whose training loss stays above a known height, whatever the network."""

    @property
    def noise_floor(self) -> float:
        """That height."""
