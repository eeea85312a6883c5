"""Vectors u in the outputs' space whose u uᵀ is, or averages to, the output Hessian."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from hessfree.preconditioners.base import Sample


def cotangents(sample: Sample, factors: str) -> tuple[Iterator[Tensor], str | None]:
    """Return vectors u `[Z]` whose u uᵀ sum to H: on average over draws, and within a sample.

    Args:
        sample: The network on the curvature batch.
        factors: "sampled" for one vector, "exact" for one a column of H's root.

    Returns:
        The vectors, and a warning where H has no root and the empirical Fisher matrix stands in.
    """
    form, space = sample.hessian.form, sample.hessian.space
    generator = sample.generator()
    if form is None:
        # sqrt(N) times the mean loss's own gradients: u uᵀ has the empirical Fisher matrix as its mean
        own = space.flatten(sample.gradients) * math.sqrt(sample.mean_over)
        return iter([own * signs(sample, generator)]), (
            "the Hessian of the loss in the outputs has no structure that can be sampled; the preconditioner uses "
            "the loss's own output gradients instead (the empirical Fisher)"
        )
    if factors == "exact":
        return (u * signs(sample, generator) for u in form.columns(space)), None
    return iter([form.root(sample.signs(generator))]), None


def signs(sample: Sample, generator: torch.Generator) -> Tensor:
    """Draw a sign for each sample: samples that one backward pass sums up must not correlate.

    Args:
        sample: The network on the curvature batch.
        generator: On their device.

    Returns:
        Signs `[Z]`, the same for all outputs of a sample; those of another batch are of other samples.
    """
    space = sample.hessian.space
    drawn = sample.signs(generator, by_samples=True).split(sample.batch_rows)
    rows = [shape[0] if shape else 1 for shape in space.shapes]
    pieces = zip(rows, space.numels, sample.batches or [0] * len(rows), strict=True)
    return torch.cat([drawn[batch][:n].repeat_interleave(numel // max(n, 1)) for n, numel, batch in pieces])
