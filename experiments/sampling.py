"""Samples of a velocity field: normal noise carried along it from t = 0 to t = 1. torchdiffeq does the solving."""

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from experiments.environment import UsageError
from experiments.flow_matching import Field

Method = Literal["euler", "midpoint", "rk4", "dopri5"]
METHODS: tuple[str, ...] = get_args(Method)


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """A rule for the ordinary differential equation dx/dt = v(x, t).

    Attributes:
        method: "euler", "midpoint" or "rk4" take equal steps of one, two or four evaluations of the field; "dopri5"
            (Dormand and Prince 1980) chooses its steps by an error estimate.
        steps: Number of equal steps; "dopri5" does not ask for it.
        tolerance: Of "dopri5", relative and absolute, a step.
    """

    method: Method = "midpoint"
    steps: int = 50
    tolerance: float = 1e-5

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            UsageError: If one makes no sense.
        """
        if self.method not in METHODS:
            raise UsageError(f"--sampler {self.method!r} is unknown; choose one of: {', '.join(METHODS)}")
        if self.steps < 1:
            raise UsageError(f"--sampler-steps {self.steps} does not lead from t = 0 to t = 1; give a positive number")
        if not (math.isfinite(self.tolerance) and self.tolerance > 0):
            raise UsageError(f"--sampler-tolerance {self.tolerance:g} bounds no error; give a positive number")

    def __str__(self) -> str:
        """Name the rule and what bounds its error."""
        return f"{self.method}, {f'tolerance {self.tolerance:g}' if self.adaptive else f'{self.steps} steps'}"

    @property
    def adaptive(self) -> bool:
        """Whether the rule chooses its steps."""
        return self.method == "dopri5"

    def for_solver(self, device: torch.device) -> dict[str, Any]:
        """Give what `torchdiffeq.odeint` is to be told of the rule.

        Args:
            device: Where the points are.

        Returns:
            Its keyword arguments.
        """
        if not self.adaptive:
            return {"method": self.method}
        # An adaptive solver keeps times and tolerances as float64 on the points' device, and MPS has none.
        options = {"dtype": torch.float32} if device.type == "mps" else None
        return {"method": self.method, "rtol": self.tolerance, "atol": self.tolerance, "options": options}

    @torch.no_grad()
    def carry(self, field: Field, x0: Tensor) -> Tensor:
        """Carry points along the field.

        Args:
            field: The velocity field v(x, t), called with a scalar t.
            x0: Where the points are at t = 0, `[n, D]`.

        Returns:
            Where they are at t = 1, `[n, D]`. Where the field diverges their numbers are not finite; "dopri5" steps for
            all points together, and returns NaN for all if it cannot follow one of them.
        """
        from torchdiffeq import odeint

        times = torch.linspace(0, 1, 2 if self.adaptive else self.steps + 1, device=x0.device)
        try:
            return odeint(lambda t, x: field(x, t), x0, times, **self.for_solver(x0.device))[-1]
        except AssertionError:  # torchdiffeq's word for a step that underflows, or for values that are not finite
            return torch.full_like(x0, torch.nan)

    def generate(
        self, field: Field, n: int, dim: int, generator: torch.Generator, device: torch.device | str = "cpu"
    ) -> Tensor:
        """Draw samples.

        Args:
            field: The velocity field v(x, t).
            n: Number of samples.
            dim: Their dimension D.
            generator: Draws the noise, on the CPU: every device, and every field, starts from the same points.
            device: Where the field lives.

        Returns:
            Samples, `[n, dim]`, on `device`.
        """
        return self.carry(field, torch.randn(n, dim, generator=generator).to(device))
