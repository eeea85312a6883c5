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
        spectrum = scale * block["spectrum"] + shifts[block["weight"]]
        # without damping a direction of no curvature is left alone rather than blown up
        floor = torch.finfo(spectrum.dtype).eps * spectrum.max()
        inverse = 1 / torch.maximum(spectrum, floor + torch.finfo(spectrum.dtype).tiny)
        prepared.append((block["weight"], block["bias"], block["inner_basis"], block["outer_basis"], inverse))
    scales = {}
    for i, d in diagonal.items():
        total = scale * d + shifts[i]
        floor = torch.finfo(total.dtype).eps * total.max()
        scales[i] = 1 / torch.maximum(total, floor + torch.finfo(total.dtype).tiny)

    def apply(r: Tensor) -> Tensor:
        pieces = parameters.split(r)
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


def _eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return the eigenvalues, none negative, and eigenvectors; in float32 at least, on the host where a device has no eigh."""
    work = matrix if matrix.dtype == torch.float64 else matrix.float()
    if matrix.device.type == "mps":
        values, vectors = (t.to(matrix.device) for t in torch.linalg.eigh(work.cpu()))
    else:
        values, vectors = torch.linalg.eigh(work)
    return values.clamp_min(0).to(matrix.dtype), vectors.to(matrix.dtype)
