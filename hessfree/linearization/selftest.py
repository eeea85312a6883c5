"""Does a linearisation do what it says? Asked before its products are trusted."""

from __future__ import annotations

import torch
from torch import Tensor

from hessfree.linearization.base import Linearization
from hessfree.precision import unit
from hessfree.vectors import ParameterVector


def find_fault(
    candidate: Linearization, reference: Linearization, parameters: ParameterVector, known: bool = False
) -> str | None:
    """Compare `candidate` with the autograd graph, at random vectors.

    Args:
        candidate: The linearisation to test.
        reference: One that is right, of the same outputs (the graph back end).
        parameters: The parameters.
        known: Whether it passed the test before, and only changes of J are to be found: by one product Jᵀu, which
            takes the graph one backward pass.

    Returns:
        What is wrong, in words, or None.
    """
    if candidate.space.shapes != reference.space.shapes:
        return f"its outputs have shapes {candidate.space.shapes}, the recorded ones {reference.space.shapes}"
    generator = torch.Generator("cpu").manual_seed(0)
    v, other = (_random(parameters.size, parameters.values(), generator) for _ in range(2))
    u = _random(reference.space.size, reference.space.zeros(), generator)
    # a recording under autocast is only as good as its outputs' precision
    dtypes = (*candidate.space.dtypes, *reference.space.dtypes)
    tolerance = 8 * max(unit(dtype, parameters.device) for dtype in dtypes) ** 0.75

    def differ(found: Tensor, truth: Tensor) -> bool:
        return not bool((found - truth).norm() <= tolerance * truth.norm())  # a NaN differs

    if known:
        return "its Jacobian is no longer the network's" if differ(candidate.vjp(u), reference.vjp(u)) else None
    first = candidate.jvp(v)
    if differ(first, reference.jvp(v)) or differ(candidate.jvp(other), reference.jvp(other)):
        return "its product Jv differs from the autograd graph's"
    if differ(candidate.jvp(v), first):  # a second use, after another vector went through
        return "the same product gave two results"
    if differ(candidate.vjp(u), reference.vjp(u)) or differ(candidate.vjp(u), reference.vjp(u)):
        return "its product Jᵀu differs from the autograd graph's"
    return None


def close(found: Tensor, truth: Tensor) -> bool:
    """Tell whether two ways to compute the same differ by rounding alone; true where the truth is not finite."""
    if not bool(truth.isfinite().all()):
        return True  # a network that diverged tells nothing
    return bool((found - truth).norm() <= unit(truth.dtype, truth.device) ** 0.75 * truth.norm())


def _random(size: int, like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(size, generator=generator, device="cpu").to(device=like.device, dtype=like.dtype)
