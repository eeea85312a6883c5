"""The moments of the first layer's input, where the data that it comes from are known."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from experiments import data
from experiments.paths import STRAIGHT
from experiments.problems import Problem
from experiments.problems.flow import FlowMatching

if TYPE_CHECKING:
    from hessfree.preconditioners import InputMoments

_POINTS = 4096  # of the data
_POINTS_SEED = 1


def known_data(problem: Problem) -> str | None:
    """Name the data set whose points the network is shown on their way from noise.

    Args:
        problem: What is to be solved.

    Returns:
        A name, which a record of settings can hold where 4096 points cannot. None where rows are fixed, and have
        moments of their own, for paths that are not `STRAIGHT`, and for data that have no name on the command line.
    """
    # The moments' formula is that of straight paths at uniform times.
    name = problem.dataset.name if isinstance(problem, FlowMatching) and problem.paths == STRAIGHT else None
    return name if name in data.NAMES else None


def moments_of_first_layer(
    name: str | None, parameters: Sequence[nn.Parameter]
) -> dict[nn.Linear | Tensor, InputMoments]:
    """Give what K-FAC is told of the input (x_t, t).

    Args:
        name: From `known_data`.
        parameters: Those of the network; the weight of the layer that takes (x_t, t) is the first.

    Returns:
        Its moments by that weight, on the CPU; nothing where the data are not known.
    """
    from experiments.moments import flow_matching_moments_of

    if name is None:
        return {}
    # They are averaged in float64, which not every accelerator has; K-FAC moves the factor to where it is needed.
    return {parameters[0]: flow_matching_moments_of(_points(name))}


@functools.cache
def _points(name: str) -> Tensor:
    """Draw points of a data set, once a process: to read it is the problem's work, and not the optimizer's."""
    return data.load(name).sample(_POINTS, torch.Generator().manual_seed(_POINTS_SEED))
