"""A Kronecker product in eigenform, and the inverse of its damped sum over layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hessfree.solvers import Map
from hessfree.vectors import ParameterVector


@dataclasses.dataclass(frozen=True, eq=False)
class KroneckerBlock:
    """The block of one weight, seen as `[out, in]` (or G such matrices), with its bias as a further column: G ≈ S ⊗ A.

    A factor that is diagonal is held as its diagonal and has no basis. A wide A may be held by its r largest
    eigenvalues and one value, the mean of the others, for all that is orthogonal to their eigenvectors.

    Attributes:
        weight: Number of the weight among the parameters.
        bias: Number of the bias; None without one.
        groups: G, the number of matrices that the weight is made of.
        transposed: Whether the weight is stored as `[in, out]`.
        inner: A, `[in (+1), in (+1)]`, with a leading G where G > 1; or its diagonal.
        outer: S, `[out, out]`, likewise.
        inner_values: Eigenvalues of A, negative ones (rounding) as zero; its largest r with a tail.
        inner_flat: The mean of A's other eigenvalues; None where its basis is complete.
        inner_basis: Eigenvectors of A, as columns; None for the coordinate axes.
        outer_basis: Eigenvectors of S, as columns; None for the coordinate axes.
        spectrum: Eigenvalues of S ⊗ A, `[out, in (+1)]`, negative ones (rounding) as zero; `[out, r]` with a tail.
        tail: Eigenvalues of S times the flat value of A, `[out]`; None where A's basis is complete.
    """

    weight: int
    bias: int | None
    groups: int
    transposed: bool
    inner: Tensor
    outer: Tensor
    inner_values: Tensor
    inner_flat: Tensor | None
    inner_basis: Tensor | None
    outer_basis: Tensor | None
    spectrum: Tensor
    tail: Tensor | None = None

    @classmethod
    def of(
        cls,
        place: Place,
        inner: Tensor,
        outer: Tensor,
        rank: int | None = None,
        known: Mapping[str, Any] | None = None,
    ) -> KroneckerBlock:
        """Take the eigenform of both factors.

        Args:
            place: Which parameters it stands for.
            inner: A, or its diagonal.
            outer: S, or its diagonal.
            rank: Keep only so many eigenvectors of A; None for all.
            known: A block of the same A, whose eigenform of it to take over; None to decompose.

        Returns:
            The block.
        """
        flat = None
        if known is not None:
            a, basis, flat = known["inner_values"], known["inner_basis"], known["inner_flat"]
        else:
            a, basis = _eigenform(inner, place.groups)
            if rank is not None and basis is not None:  # eigenvalues ascend
                a, basis = a[..., -rank:], basis[..., -rank:].clone()  # a view would keep the others in memory
                trace = inner.diagonal(dim1=-2, dim2=-1).sum(-1)
                flat = ((trace - a.sum(-1)) / max(inner.shape[-1] - rank, 1)).clamp_min(0)
        s, outer_basis = _eigenform(outer, place.groups)
        return cls(
            place.weight,
            place.bias,
            place.groups,
            place.transposed,
            inner,
            outer,
            a,
            flat,
            basis,
            outer_basis,
            s.unsqueeze(-1) * a.unsqueeze(-2),
            None if flat is None else s * flat.unsqueeze(-1),
        )

    def state(self) -> dict[str, Any]:
        """Return the block as a plain dict, for a checkpoint."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


class Place(NamedTuple):
    """Which parameters a block stands for, and how the weight is made of matrices (see `KroneckerBlock`)."""

    weight: int
    bias: int | None
    groups: int = 1
    transposed: bool = False

    @property
    def numbers(self) -> tuple[int, ...]:
        """The numbers of its parameters."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)


def kronecker_inverse(
    blocks: Sequence[Mapping[str, Any]],
    diagonal: Mapping[int, Tensor],
    parameters: ParameterVector,
    scale: float,
    shifts: Sequence[float],
    power: float = 1.0,
) -> Map:
    """Return r ↦ (scale · blockdiag(S ⊗ A, ..., diagonal) + diag(shifts))^(−power) r.

    Args:
        blocks: States of `KroneckerBlock`.
        diagonal: By number of parameter, for parameters in no block.
        parameters: The parameters.
        scale: Factor on the matrix.
        shifts: One number a parameter; a block takes its weight's.
        power: Of the inverse.

    Returns:
        The map on `[P]` vectors.
    """
    prepared = []
    for block in blocks:
        shift = shifts[block["weight"]]
        inverse = _reciprocal(scale * block["spectrum"] + shift, power)
        tail = None
        if block["tail"] is not None:
            tail = _reciprocal(scale * block["tail"] + shift, power).unsqueeze(-1)
            inverse = inverse - tail
        prepared.append((block, inverse, tail))
    scales = {i: _reciprocal(scale * d + shifts[i], power) for i, d in diagonal.items()}

    def apply(r: Tensor) -> Tensor:
        pieces = parameters.views(r)
        out: list[Tensor | None] = list(pieces)
        for block, inverse, tail in prepared:
            matrix = _turn(matrix_of(block, pieces), block, inverse, tail)
            write_matrix(block, matrix, out)
        for i, s in scales.items():
            out[i] = pieces[i] * s
        whole = torch.empty_like(r)
        for view, piece in zip(parameters.views(whole), out, strict=True):
            assert piece is not None
            view.copy_(piece.reshape(view.shape))  # what is next to a bias is a view, and would be copied twice
        return whole

    return apply


def _turn(matrix: Tensor, block: Mapping[str, Any], inverse: Tensor, tail: Tensor | None) -> Tensor:
    """Go to the eigenbasis, multiply, and come back."""
    inner, outer = block["inner_basis"], block["outer_basis"]
    if outer is not None:
        matrix = outer.mT @ matrix
    # no name holds on to what is used up: for a wide layer it is as large as all other vectors of an iteration
    if tail is not None:
        assert inner is not None
        turned = (matrix @ inner).mul_(inverse) @ inner.mT
        matrix = turned.addcmul_(matrix, tail.expand_as(matrix))
    elif inner is None:
        matrix = matrix * inverse
    else:
        matrix = matrix @ inner
        matrix = matrix.mul_(inverse) @ inner.mT
    return matrix if outer is None else outer @ matrix


def matrix_of(block: Mapping[str, Any], pieces: Sequence[Tensor] | Mapping[int, Tensor]) -> Tensor:
    """Return the block's weight, with its bias as a further column, as the matrices it is made of.

    Args:
        block: A place, or the state of a block.
        pieces: By number of parameter, tensors shaped like the parameters.

    Returns:
        `[out, in (+1)]`, with a leading G where G > 1.
    """
    weight, groups = pieces[block["weight"]], block["groups"]
    if block["transposed"]:
        weight = weight.T
    elif groups > 1:
        weight = weight.reshape(groups, weight.shape[0] // groups, -1)
    else:
        weight = weight.reshape(weight.shape[0], -1)
    if block["bias"] is None:
        return weight
    return torch.cat([weight, pieces[block["bias"]].reshape(*weight.shape[:-1], 1)], -1)


def write_matrix(block: Mapping[str, Any], matrix: Tensor, out: list[Tensor | None]) -> None:
    """Take `matrix` apart again, into tensors with their parameters' numbers of elements.

    Args:
        block: A place, or the state of a block.
        matrix: As `matrix_of` gives it.
        out: Written at the block's parameters.
    """
    if block["bias"] is not None:
        out[block["bias"]] = matrix[..., -1]
        matrix = matrix[..., :-1]
    out[block["weight"]] = matrix.T if block["transposed"] else matrix


def _reciprocal(spectrum: Tensor, power: float) -> Tensor:
    """Return `spectrum` to the power −`power`, finite in spite of zeros.

    Without damping a zero is as good as the rounding of the largest.

    Args:
        spectrum: Not negative.
        power: Positive.

    Returns:
        The powers.
    """
    if not spectrum.numel():
        return spectrum
    precision, largest = torch.finfo(spectrum.dtype), spectrum.max()
    floor = (precision.eps * largest).clamp_min(precision.tiny)
    # no curvature and no damping at all: leave the gradient as it is
    inverse = 1 / torch.maximum(spectrum, floor)
    return torch.where(largest > 0, inverse if power == 1 else inverse**power, 1)


def _eigenform(factor: Tensor, groups: int) -> tuple[Tensor, Tensor | None]:
    """Return eigenvalues and eigenvectors of a factor; of a diagonal one, itself and None."""
    if factor.ndim == (1 if groups == 1 else 2):
        return factor.clamp_min(0), None
    return eigh(factor)


def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues and eigenvectors of a positive semi-definite matrix, on the host where the device has no eigh.

    Args:
        matrix: `[..., n, n]`, symmetric.

    Returns:
        The eigenvalues `[..., n]`, ascending, those below zero (rounding) as zero; and the eigenvectors as columns.

    Raises:
        LinAlgError: The iterations converge in double precision neither.
    """
    work = matrix.cpu() if matrix.device.type == "mps" else matrix
    try:
        values, vectors = torch.linalg.eigh(work)
    except torch.linalg.LinAlgError:  # float32 iterations that do not converge do in double precision
        values, vectors = (t.to(matrix.dtype) for t in torch.linalg.eigh(work.cpu().double()))
    return values.clamp_min(0).to(matrix.device), vectors.to(matrix.device)
