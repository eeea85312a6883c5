"""The density that a flow gives its samples: log p(x) by one more component of the differential equation.

Along dx/dt = v(x, t) from a standard normal at t = 0, the density at the moving point obeys d log p / dt = -div v
(Chen et al. 2018, Neural Ordinary Differential Equations, theorem 1). From x at t = 1 both are solved backwards,

    dx/dt = v,  da/dt = div v,  a(1) = 0,    log p(x) = log N(x(0); 0, I) + a(0),

with v `[B, D]` and div v `[B]` from `hessfree.jacobian`. The divergence is the trace of a Jacobian: D reverse passes
exactly; or one with random signs ε, εᵀJε, where D is large. The signs then stay the same along the trajectory
(Grathwohl et al. 2019, FFJORD, sec. 3.1), so that the solver sees a smooth field, and a(0) is unbiased as a whole.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from experiments.flow_matching import Field
from experiments.sampling import Sampler
from hessfree.jacobian import divergence, hutchinson_divergence

_ADAPTIVE = Sampler(method="dopri5", tolerance=1e-5)


@dataclass(frozen=True)
class Likelihood:
    """What a flow says of points.

    Attributes:
        log_density: log p(x), nats, `[B]`.
        latents: Where the points come from: x at t = 0, `[B, D]`.
        evaluations: How often the field and its divergence were evaluated.
    """

    log_density: Tensor
    latents: Tensor
    evaluations: int


def log_likelihood(field: Field, x: Tensor, *, noise: Tensor | None = None, sampler: Sampler = _ADAPTIVE) -> Likelihood:
    """Return log p of points under a flow that starts from a standard normal.

    Args:
        field: The velocity field v(x, t) `[n, D]`, row by row, called with a scalar t.
        x: Points at t = 1, `[B, D]`.
        noise: ε `[B, D]` for Hutchinson's estimate of the divergence, as of `random_signs`; None: exactly.
        sampler: The rule of the solver.

    Returns:
        The densities. An average over noises of exp(log p) is biased; of log p it is not.

    Raises:
        ValueError: If `noise` has another shape than `x`.
    """
    from torchdiffeq import odeint

    if noise is not None and noise.shape != x.shape:
        raise ValueError(f"noise has shape {list(noise.shape)}, the points {list(x.shape)}: give one ε a point")
    evaluations = 0

    def derivative(t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        nonlocal evaluations
        evaluations += 1
        if noise is None:
            return divergence(field, state[0], t)
        return hutchinson_divergence(field, state[0], noise, t)

    times = torch.linspace(1, 0, 2 if sampler.adaptive else sampler.steps + 1, dtype=x.dtype, device=x.device)
    with torch.no_grad():
        paths = odeint(derivative, (x, x.new_zeros(len(x))), times, **sampler.for_solver(x.device))
    latents, change = (path[-1] for path in paths)
    normal = -0.5 * latents.square().sum(1) - 0.5 * x.shape[1] * math.log(2 * math.pi)
    return Likelihood(normal + change, latents, evaluations)


def random_signs(x: Tensor, generator: torch.Generator) -> Tensor:
    """Draw ±1 with equal chances: of all noise with E[εεᵀ] = I the one with the least variance of εᵀJε.

    Args:
        x: Gives the shape, the dtype and the device.
        generator: The source, on the CPU: every device gets the same signs.

    Returns:
        ε, like `x`.
    """
    return (2 * torch.randint(2, x.shape, generator=generator) - 1).to(x)
