"""Minibatch optimal transport: which noise goes with which data point.

Within a minibatch of n noise points and n data points, all as likely, the coupling with the least mean squared distance
is a permutation. Its straight paths cross less, so that the velocity at a point says more of where the path leads; the
marginals are those of the independent coupling.

Source: Tong et al. 2024 (arXiv 2302.00482, sec. 3.2.3); Pooladian et al. 2023 (arXiv 2304.14772).
"""

import torch
from torch import Tensor

from experiments.environment import UsageError


def pair(x0: Tensor, x1: Tensor) -> Tensor:
    """Find the data point that goes with each noise point, by exact optimal transport (POT's network simplex).

    Args:
        x0: Noise, `[n, D]`.
        x1: Data points, `[n, D]`.

    Returns:
        Indices into `x1`, `[n]`, int64 on the device of `x1`, each once: x0[i] goes with x1[indices[i]] and the sum of
        |x0[i] - x1[indices[i]]|² is the least of all permutations.

    Raises:
        ValueError: If the shapes differ or are not `[n, D]`.
        UsageError: If POT is not installed.
    """
    if x0.shape != x1.shape or x0.dim() != 2:
        raise ValueError(f"x0 has shape {list(x0.shape)} and x1 {list(x1.shape)}; both must be [n, D], of one n and D")
    try:
        import ot
    except ModuleNotFoundError:
        raise UsageError('optimal-transport pairing needs POT; run: pip install -e ".[ot]"') from None
    cost = torch.cdist(x0.detach().cpu().double(), x1.detach().cpu().double()).square()
    plan = torch.from_numpy(ot.emd(ot.unif(len(x0)), ot.unif(len(x1)), cost.numpy()))
    return plan.argmax(1).to(x1.device)  # a vertex of the polytope of couplings with equal masses is a permutation
