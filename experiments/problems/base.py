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

    @property
    def outputs(self) -> int:
        """Numbers that the network gives for a row: the rows that the Jacobian has for each."""

    @property
    def first_loss(self) -> float:
        """Height of the loss at initial weights: its order of magnitude is that of a first damping."""

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


@runtime_checkable
class Layered(Protocol):
    """A problem whose network has hidden layers of one width, which the user may choose."""

    @property
    def width(self) -> int:
        """Of the hidden layers."""

    @property
    def n_hidden(self) -> int:
        """Number of these."""


_FIRST_ROWS = 1024


class _Trainable(Protocol):
    """The part of a problem that the first loss needs."""

    def initial_model(self, seed: int) -> nn.Module: ...

    def stream(self, seed: int) -> Stream: ...

    def loss(self, model: nn.Module, batch: Any) -> Tensor: ...


def loss_at_start(problem: _Trainable) -> float:
    """Evaluate the loss of seed 0's weights on seed 0's first rows.

    Args:
        problem: What is to be solved.

    Returns:
        The loss on up to 1024 rows.
    """
    return problem.loss(problem.initial_model(0), problem.stream(0).draw(_FIRST_ROWS)).item()


def parameters_of(problem: Problem) -> int:
    """Count the parameters of a problem's network.

    Args:
        problem: What is to be solved.

    Returns:
        P.
    """
    return sum(parameter.numel() for parameter in problem.initial_model(0).parameters())
