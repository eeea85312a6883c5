"""Does a linearisation do what it says? Asked before its products are trusted."""

from __future__ import annotations

import torch

from hessfree.linearization.base import Linearization
from hessfree.vectors import ParameterVector


def find_fault(candidate: Linearization, reference: Linearization, parameters: ParameterVector) -> str | None:
    """Compare `candidate` with the autograd graph, at random vectors.

    Args:
        candidate: The linearisation to test.
        reference: One that is right, of the same outputs (the graph back end).
        parameters: The parameters.

    Returns:
        What is wrong, in words, or None.
    """
    tolerance = 8 * torch.finfo(candidate.space.dtype).eps ** 0.75
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(parameters.size, generator=generator).to(device=parameters.device, dtype=parameters.dtype)
    if candidate.space.shapes != reference.space.shapes:
        return f"its outputs have shapes {candidate.space.shapes}, the recorded ones {reference.space.shapes}"
    first, second, truth = candidate.jvp(v), candidate.jvp(v), reference.jvp(v)
    if not bool((first - second).norm() <= tolerance * first.norm()):
        return "the same product gave two results"
    if not bool((first - truth).norm() <= tolerance * truth.norm()):
        return "its product Jv differs from the autograd graph's"
    u = truth
    left, right = candidate.vjp(u), reference.vjp(u)
    if not bool((left - right).norm() <= tolerance * right.norm()):
        return "its product Jᵀu differs from the autograd graph's"
    return None
