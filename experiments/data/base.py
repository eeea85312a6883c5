"""What the experiments ask of a data set."""

from typing import Literal, Protocol

import torch
from torch import Tensor

Score = Literal["excess_loss", "holdout_loss"]


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

    @property
    def knows_expectation(self) -> bool:
        """Whether `conditional_expectation` is cheap enough to be asked for thousands of points."""

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """Draw training points `[n, D]`."""

    def holdout(self, n: int, generator: torch.Generator) -> Tensor:
        """Draw points `[n, D]` that training never sees."""

    def conditional_expectation(self, x_t: Tensor, t: Tensor, sigma: float = 0.0) -> Tensor:
        """Give E[u | x_t, t] `[n, D]` for x_t = (1-t) x0 + t x1 + sigma e, u = x1 - x0, x0 and e standard normal."""
