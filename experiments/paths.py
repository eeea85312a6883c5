"""Conditional paths from noise to data: how the two are coupled, how far paths stray, which times are drawn.

A standard normal x0 and a data point x1 are joined by x_t = (1-t) x0 + t x1 + sigma e, e standard normal too, whose
velocity is u = x1 - x0.

Source: Tong et al. 2024 (arXiv 2302.00482), sec. 3.2.2 (independent coupling) and 3.2.3 (minibatch optimal transport);
times: Esser et al. 2024 (arXiv 2403.03206), sec. 3.1.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from experiments.environment import UsageError
from experiments.optimal_transport import pair

Coupling = Literal["independent", "ot"]
Times = Literal["uniform", "logit-normal"]
COUPLINGS: tuple[str, ...] = get_args(Coupling)
TIMES: tuple[str, ...] = get_args(Times)

# Rows among which optimal transport pairs. A row then costs about 18 us in blocks of 64, 23 in 128 and 47 in 256 (one
# thread, two dimensions).
OT_BLOCK = 128


@dataclass(frozen=True)
class Batch:
    """Points on conditional paths with the velocity to learn.

    Attributes:
        x_t: Points, `[n, D]`.
        t: Their times, `[n, 1]`, in [0, 1].
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


@dataclass(frozen=True, kw_only=True)
class Paths:
    """A distribution of conditional paths.

    Attributes:
        sigma: Standard deviation of the noise about the straight line.
        coupling: "independent": noise and data know nothing of each other, and E[u | x_t, t] has a closed form. "ot":
            they are paired by optimal transport within blocks of `OT_BLOCK` rows, and it has none.
        times: "uniform" on [0, 1); "logit-normal": the logistic function of a standard normal, which visits the middle
            more often. E[u | x_t, t] is the same for both.
    """

    sigma: float = 0.0
    coupling: Coupling = "independent"
    times: Times = "uniform"

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            UsageError: If one makes no sense.
        """
        if not (math.isfinite(self.sigma) and self.sigma >= 0):
            raise UsageError(f"--sigma {self.sigma:g} is no standard deviation; give 0 or a positive number")
        if self.coupling not in COUPLINGS:
            raise UsageError(f"--coupling {self.coupling!r} is unknown; choose one of: {', '.join(COUPLINGS)}")
        if self.times not in TIMES:
            raise UsageError(f"--times {self.times!r} is unknown; choose one of: {', '.join(TIMES)}")

    @property
    def independent(self) -> bool:
        """Whether noise and data are independent."""
        return self.coupling == "independent"

    @property
    def suffix(self) -> str:
        """What these paths add to the name of a problem; nothing, if they are the usual ones."""
        parts = ["ot"] * (not self.independent) + [f"sigma{self.sigma:g}"] * bool(self.sigma)
        parts += [self.times] * (self.times != "uniform")
        return "".join(f"-{part}" for part in parts)

    def join(self, x1: Tensor, generator: torch.Generator) -> Batch:
        """Draw a path to each data point, and a point on it.

        Args:
            x1: Data points, `[n, D]`, on the CPU.
            generator: Draws noise and times, on the CPU.

        Returns:
            The batch of n rows, on the CPU, in the order of `x1` but for permutations within blocks of `OT_BLOCK` rows
            under optimal transport.
        """
        x0 = torch.randn(x1.shape, generator=generator)
        t = self._draw_times(len(x1), generator)
        if not self.independent:
            blocks = zip(x0.split(OT_BLOCK), x1.split(OT_BLOCK), strict=True)
            x1 = torch.cat([points[pair(noise, points)] for noise, points in blocks])
        x_t = torch.lerp(x0, x1, t)
        if self.sigma:
            x_t = x_t + self.sigma * torch.randn(x1.shape, generator=generator)
        return Batch(x_t, t, x1 - x0)

    def _draw_times(self, n: int, generator: torch.Generator) -> Tensor:
        if self.times == "uniform":
            return torch.rand(n, 1, generator=generator)
        return torch.randn(n, 1, generator=generator).sigmoid()


STRAIGHT = Paths()
