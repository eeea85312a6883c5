"""Closed forms of E[u | x_t, t] on the path x_t = (1-t) x0 + t x1 + sigma e, u = x1 - x0, x0 and e standard normal.

Given x1, x_t is normal with mean t x1 and variance (1-t)² + sigma², and E[x0 | x_t, x1] is the share
(1-t) / ((1-t)² + sigma²) of x_t - t x1. At sigma = 0 the textbook form (E[x1 | x_t] - x_t) / (1 - t) loses all digits
as t goes to 1, and its mirror image (x_t - E[x0 | x_t]) / t as t goes to 0. What follows avoids both, in
float64; MPS has none, so there the work is done on the CPU and only the result goes back.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from experiments.models import time_column

_CHUNK = 1 << 21  # elements of the largest intermediate tensor: 16 MB in float64
_LAST_TIME = 1 - 1e-6  # the squares and point masses of x_t's posterior degenerate at t = 1
_QUADRATURE_NODES = 24  # for intervals at most two standard deviations wide: full float64 precision


def mixture_velocity(x_t: Tensor, t: Tensor, means: Tensor, variance: float, sigma: float = 0.0) -> Tensor:
    """Give E[u | x_t, t] for equally likely Gaussians (or points) as x1.

    Given component k, (u, x_t) is jointly Gaussian: E[u | x_t, k] = m_k + (t s - (1-t)) / v · (x_t - t m_k) with
    s the variance and v = (1-t)² + t² s + sigma²; no division by t or 1-t alone. Components are weighed by
    N(x_t; t m_k, v).

    Args:
        x_t: Points, `[n, D]`.
        t: Times, `[n, 1]`, `[n]` or one for all.
        means: Centres, `[K, D]`.
        variance: Variance of a component along each axis; 0 for a finite set of points.
        sigma: Standard deviation of the path's own noise.

    Returns:
        The expectation, `[n, D]`, in the dtype and on the device of `x_t`.
    """

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        m = means.to(x)
        v = (1 - t) ** 2 + variance * t**2 + sigma**2
        # |x - t m|² without |x|², which is common to all components and cancels in the softmax.
        squared = (t * m.square().sum(1) - 2 * x @ m.T) * t
        mean = torch.softmax(-squared / (2 * v), dim=1) @ m
        return mean + (t * variance - (1 - t)) / v * (x - t * mean)

    return _in_float64(velocity, x_t, t, width=len(means))


def squares_velocity(x_t: Tensor, t: Tensor, corners: Tensor, side: float, sigma: float = 0.0) -> Tensor:
    """Give E[u | x_t, t] for x1 uniform over equal squares.

    Given its square, x1 is normal and truncated, axis by axis. Before t = 1/2 the interval is narrow in units of the
    normal's deviation and Gauss–Legendre quadrature over x1 is exact; later the moments of the truncated normal are
    taken for the noise (1-t) x0 + sigma e, where the division is by t.

    Args:
        x_t: Points, `[n, D]`.
        t: Times, `[n, 1]`, `[n]` or one for all.
        corners: Lowest corners of the squares, `[K, D]`.
        side: Length of a side.
        sigma: Standard deviation of the path's own noise.

    Returns:
        The expectation, `[n, D]`, in the dtype and on the device of `x_t`.
    """

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        lowest = corners.to(x)
        result = torch.empty_like(x)
        early = (t < 0.5).squeeze(1)
        result[early] = _early_squares(x[early], t[early], lowest, side, sigma)
        result[~early] = _late_squares(x[~early], t[~early], lowest, side, sigma)
        return result

    return _in_float64(velocity, x_t, t, width=corners.numel() * _QUADRATURE_NODES)


def _early_squares(x: Tensor, t: Tensor, corners: Tensor, side: float, sigma: float) -> Tensor:
    """E[x1 | x] - E[x0 | x], the moments of x1 by quadrature over each interval."""
    variance = (1 - t) ** 2 + sigma**2  # of x about t x1
    points, weights = np.polynomial.legendre.leggauss(_QUADRATURE_NODES)
    nodes = corners[..., None] + side * (torch.from_numpy(points).to(x) + 1) / 2  # [K, D, Q]
    deviation = x[:, None, :, None] - t[:, :, None, None] * nodes  # [n, K, D, Q]
    log_mass = torch.from_numpy(weights).to(x).log() - deviation.square() / (2 * variance[:, :, None, None])
    mean = (torch.softmax(log_mass, dim=-1) * nodes).sum(-1)  # [n, K, D]
    share = torch.softmax(log_mass.logsumexp(-1).sum(-1), dim=1)  # [n, K]
    x1 = (share[..., None] * mean).sum(1)
    return x1 - (1 - t) / variance * (x - t * x1)


def _late_squares(x: Tensor, t: Tensor, corners: Tensor, side: float, sigma: float) -> Tensor:
    """E[x1 | x] - E[x0 | x] = (x - w E[y | x]) / t from y = (x - t x1) / scale, a truncated standard normal."""
    scale = ((1 - t) ** 2 + sigma**2).sqrt()
    high = (x[:, None] - t[:, None] * corners) / scale[:, None]  # [n, K, D]
    low = (x[:, None] - t[:, None] * (corners + side)) / scale[:, None]
    # Mirror intervals in the upper half to the lower, where the logarithm of the normal's integral keeps its digits.
    mirrored = low + high > 0
    low, high = torch.where(mirrored, -high, low), torch.where(mirrored, -low, high)
    log_high = torch.special.log_ndtr(high)
    log_mass = log_high + torch.log1p(-torch.exp(torch.special.log_ndtr(low) - log_high))
    log_scale = log_mass + math.log(2 * math.pi) / 2
    mean = torch.exp(-low.square() / 2 - log_scale) - torch.exp(-high.square() / 2 - log_scale)
    mean = torch.where(mirrored, -mean, mean)
    share = torch.softmax(log_mass.sum(-1), dim=1)
    # x1 = (x - scale y) / t, and E[x0 | y] = (1-t) / scale y; without noise of its own, w is 1.
    weight = scale + t * (1 - t) / scale
    return (x - weight * (share[..., None] * mean).sum(1)) / t


def _in_float64(velocity: Callable[[Tensor, Tensor], Tensor], x_t: Tensor, t: Tensor, width: int) -> Tensor:
    """Evaluate in float64, a few rows at a time so that `width` numbers a row stay in memory."""
    device = torch.device("cpu") if x_t.device.type == "mps" else x_t.device
    x = x_t.to(device).double()
    times = time_column(x, t).clamp(0, _LAST_TIME)
    rows = max(1, _CHUNK // width)
    parts = [velocity(x[start : start + rows], times[start : start + rows]) for start in range(0, len(x), rows)]
    return torch.cat(parts).to(x_t) if parts else torch.empty_like(x_t)
