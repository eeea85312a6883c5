"""A Kronecker product in eigenform, and the inverse of its damped sum over layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hessfree.solvers import Map
from hessfree.vectors import ParameterVector


@dataclasses.dataclass(frozen=True, eq=False)
class KroneckerBlock:
    """The block of one layer's weight `[out, in]`, with its bias as a further column: G ≈ S ⊗ A.

    Attributes:
        weight: Number of the weight among the parameters.
        bias: Number of the bias; None without one.
        inner: A, `[in (+1), in (+1)]`.
        outer: S, `[out, out]`.
        inner_basis: Eigenvectors of A, as columns.
        outer_basis: Eigenvectors of S, as columns.
        spectrum: Eigenvalues of S ⊗ A, `[out, in (+1)]`, negative ones (rounding) as zero.
    """

    weight: int
    bias: int | None
    inner: Tensor
    outer: Tensor
    inner_basis: Tensor
    outer_basis: Tensor
    spectrum: Tensor

    @classmethod
    def of(cls, weight: int, bias: int | None, inner: Tensor, outer: Tensor) -> KroneckerBlock:
        """Take the eigenform of both factors."""
        a, inner_basis = _eigh(inner)
        s, outer_basis = _eigh(outer)
        return cls(weight, bias, inner, outer, inner_basis, outer_basis, torch.outer(s, a))

    def state(self) -> dict[str, Any]:
        """Return the block as a plain dict, for a checkpoint."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


def kronecker_inverse(
    blocks: Sequence[Mapping[str, Any]],
    diagonal: Mapping[int, Tensor],
    parameters: ParameterVector,
    scale: float,
    shifts: Sequence[float],
) -> Map:
    """Return r ↦ (scale · blockdiag(S ⊗ A, ..., diagonal) + diag(shifts))⁻¹ r.

    Args:
        blocks: States of `KroneckerBlock`.
        diagonal: By number of parameter, for parameters in no block.
        parameters: The parameters.
        scale: Factor on the matrix.
        shifts: One number a parameter; a block takes its weight's.

    Returns:
        The map on `[P]` vectors.
    """
    prepared = []
    for block in blocks:
        inverse = _reciprocal(scale * block["spectrum"] + shifts[block["weight"]])
        prepared.append((block["weight"], block["bias"], block["inner_basis"], block["outer_basis"], inverse))
    scales = {i: _reciprocal(scale * d + shifts[i]) for i, d in diagonal.items()}

    def apply(r: Tensor) -> Tensor:
        pieces = parameters.views(r)
        out: list[Tensor | None] = list(pieces)
        for weight, bias, inner_basis, outer_basis, inverse in prepared:
            matrix = pieces[weight]
            if bias is not None:
                matrix = torch.cat([matrix, pieces[bias][:, None]], 1)
            matrix = outer_basis @ ((outer_basis.T @ matrix @ inner_basis) * inverse) @ inner_basis.T
            if bias is not None:
                out[bias] = matrix[:, -1]
                matrix = matrix[:, :-1]
            out[weight] = matrix
        for i, s in scales.items():
            out[i] = pieces[i] * s
        return parameters.flatten(out)

    return apply


def _reciprocal(spectrum: Tensor) -> Tensor:
    """Return 1 / `spectrum`, finite in spite of zeros: without damping they are as good as the largest's rounding."""
    if not spectrum.numel():
        return spectrum
    precision, largest = torch.finfo(spectrum.dtype), spectrum.max()
    floor = (precision.eps * largest).clamp_min(precision.tiny)
    # no curvature and no damping at all: leave the gradient as it is
    return torch.where(largest > 0, 1 / torch.maximum(spectrum, floor), 1)


def _eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return the eigenvalues, none negative, and eigenvectors; on the host where the device has no eigh."""
    work = matrix.cpu() if matrix.device.type == "mps" else matrix
    try:
        values, vectors = torch.linalg.eigh(work)
    except torch.linalg.LinAlgError:  # float32 iterations that do not converge do in double precision
        values, vectors = (t.to(matrix.dtype) for t in torch.linalg.eigh(work.cpu().double()))
    return values.clamp_min(0).to(matrix.device), vectors.to(matrix.device)
