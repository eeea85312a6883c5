"""The moments of a flow-matching network's input in closed form, from those of the data.

A batch of (x_t, t) estimates the second moments of 785 inputs poorly, and K-FAC's inverse feels it; but with
x_t = (1 - t) x0 + t x1, x0 standard normal, t uniform on [0, 1], all independent, they are known exactly.
"""

import torch
from torch import Tensor

from hessfree.preconditioners import InputMoments


def flow_matching_moments(mean: Tensor, second: Tensor) -> InputMoments:
    """Give the moments of the input (x_t, t) of a velocity network.

    E[x_t x_t'] = E[(1-t)^2] I + E[t^2] E[x1 x1'] = (I + E[x1 x1']) / 3, for E[x0] = 0 leaves no cross terms;
    E[t x_t] = E[t^2] E[x1] = E[x1] / 3; E[x_t] = E[x1] / 2; E[t^2] = 1/3; E[t] = 1/2.

    Args:
        mean: E[x1] of the data, `[D]`.
        second: E[x1 x1'] of the data, `[D, D]`, not centred.

    Returns:
        The moments of the D + 1 inputs.
    """
    dim = len(mean)
    joint = second.new_empty(dim + 1, dim + 1)
    joint[:dim, :dim] = (torch.eye(dim, dtype=second.dtype, device=second.device) + second) / 3
    joint[:dim, dim] = joint[dim, :dim] = mean / 3
    joint[dim, dim] = 1 / 3
    return InputMoments(torch.cat([mean / 2, mean.new_full((1,), 0.5)]), joint)


def flow_matching_moments_of(data: Tensor) -> InputMoments:
    """Give the moments of the input (x_t, t), where x1 is a random row of `data`.

    Args:
        data: All data points, `[N, D]`, on a device that has float64.

    Returns:
        The moments of the D + 1 inputs, in double precision.
    """
    x1 = data.double()
    return flow_matching_moments(x1.mean(0), x1.T @ x1 / len(x1))
