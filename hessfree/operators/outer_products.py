"""A curvature matrix of known rank: a sum of outer products of pulled-back cotangents."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from hessfree.linearization import Linearization
from hessfree.operators.base import SymmetricOperator
from hessfree.operators.rows import at_once
from hessfree.vectors import ParameterVector


class OuterProducts(SymmetricOperator):
    """Σ_k Σ_n (Jᵀu_kn)(Jᵀu_kn)ᵀ: positive semidefinite, and of rank K·N at most.

    u_kn is the k-th cotangent at the outputs of sample n and zero at all others, so that samples stay apart although
    a product with all of them takes one Jv and one Jᵀu. Samples are the indices of dimension 0 of the outputs; where
    several outputs differ in their number of samples, u_k is taken as one.

    Attributes:
        size: P.
        dtype: Dtype of its vectors.
        device: Device of its vectors.
        linearization: J.
        cotangents: The u, `[K, Z]`.
        samples: N.
    """

    def __init__(self, linearization: Linearization, cotangents: Tensor, parameters: ParameterVector) -> None:
        """Compose the operator.

        Args:
            linearization: J.
            cotangents: The u, `[K, Z]`: K for each sample.
            parameters: The parameters.

        Raises:
            ValueError: The cotangents have another shape.
        """
        space = linearization.space
        if cotangents.ndim != 2 or cotangents.shape[1] != space.size:
            raise ValueError(
                f"cotangents of shape {tuple(cotangents.shape)} do not fit outputs of {space.size} numbers; pass "
                f"[K, {space.size}]"
            )
        self.size, self.dtype, self.device = parameters.size, parameters.dtype, parameters.device
        self.linearization = linearization
        self.cotangents = cotangents
        counts = {shape[0] if shape else 0 for shape in space.shapes}
        self.samples = counts.pop() if len(counts) == 1 and 0 not in counts else 1

    def matvec(self, v: Tensor) -> Tensor:
        """Return A v `[P]` for `v` `[P]`, from one Jv and one Jᵀu."""
        weights = self._inner(self.linearization.jvp(v))
        pieces = [(u * weights.unsqueeze(2)).sum(0).reshape(-1) for u in self._pieces(self.cotangents)]
        return self.linearization.vjp(torch.cat(pieces))

    def quadratic_form(self, vectors: Tensor) -> Tensor:
        """Return V A Vᵀ `[K, K]` for rows V `[K, P]`, from one Jv each."""
        inner = torch.stack([self._inner(self.linearization.jvp(v)).reshape(-1) for v in vectors])
        return inner @ inner.T

    def to_dense(self) -> Tensor:
        """Return the matrix `[P, P]`, the Gram matrix of K·N rows Jᵀu, and exactly symmetric."""
        dense = torch.zeros(self.size, self.size, dtype=self.dtype, device=self.device)
        for rows in self._rows():
            dense.addmm_(rows.T, rows)
        return 0.5 * (dense + dense.T)

    def diagonal(self) -> Tensor:
        """Return the exact diagonal `[P]`."""
        out = torch.zeros(self.size, dtype=self.dtype, device=self.device)
        for rows in self._rows():
            out.add_(rows.square_().sum(0))
        return out

    def _pieces(self, z: Tensor) -> list[Tensor]:
        """See vectors `[K, Z]` as one `[K, N, width]` an output."""
        return [t.reshape(len(z), self.samples, -1) for t in z.split(self.linearization.space.numels, 1)]

    def _inner(self, z: Tensor) -> Tensor:
        """Return u_knᵀ z `[K, N]`."""
        pairs = zip(self._pieces(self.cotangents), self._pieces(z.unsqueeze(0)), strict=True)
        out = torch.zeros(len(self.cotangents), self.samples, dtype=z.dtype, device=z.device)
        for u, piece in pairs:
            out += (u * piece).sum(2)
        return out

    def _rows(self) -> Iterator[Tensor]:
        """Yield the rows Jᵀu_kn in chunks `[R, P]`."""
        step = at_once(self.size)
        for pieces in zip(*self._pieces(self.cotangents), strict=True):
            for start in range(0, self.samples, step):
                numbers = torch.arange(start, min(start + step, self.samples), device=self.device)
                own = []
                for u in pieces:
                    block = u.new_zeros(len(numbers), *u.shape)
                    block[numbers - start, numbers] = u[numbers]
                    own.append(block.flatten(1))
                yield self.linearization.vjps(torch.cat(own, 1))
