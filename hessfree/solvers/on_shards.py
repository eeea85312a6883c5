"""A solver whose vectors are divided among ranks, so that each holds only its part of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from hessfree.operators import Sharded, SymmetricOperator
from hessfree.solvers.base import Map, Solution, Solver


class OnShards(Solver):
    """Solves (A + D) x = b with all vectors of `solver` divided among ranks.

    Conjugate gradients hold five (b, x, r, p and Ap), which makes 5P / ranks numbers. Whole for the time of a product
    are the direction and the product, for that of a preconditioner its argument and its value, and at the end x and r.
    """

    def __init__(self, solver: Solver, operator: Sharded) -> None:
        """Wrap `solver`.

        Args:
            solver: One that `works_on_shards`.
            operator: A, on parts of vectors.
        """
        self._solver, self._operator = solver, operator

    @property
    def uses_preconditioner(self) -> bool:
        """Whether `solve` looks at its preconditioner at all."""
        return self._solver.uses_preconditioner

    def solve(
        self,
        operator: SymmetricOperator,
        rhs: Tensor,
        shift: float | Tensor,
        precondition: Map | None = None,
        start: Tensor | None = None,
        memory: Mapping[str, Any] | None = None,
    ) -> Solution:
        """Solve (A + diag(shift)) x = rhs, see `Solver.solve`.

        Args:
            operator: Not used: the same A on whole vectors.
            rhs: b, `[P]`, the same on all ranks.
            shift: The diagonal of D: a number, or `[P]`.
            precondition: A map of whole vectors.
            start: First iterate, `[P]`.
            memory: As for the solver.

        Returns:
            The solution as whole vectors, the same on all ranks.
        """
        shards = self._operator.shards
        inverse = None if precondition is None else lambda part: shards.take(precondition(shards.whole(part)))
        found = self._solver.solve(
            self._operator,
            shards.take(rhs),
            shards.take(shift) if isinstance(shift, Tensor) else shift,
            inverse,
            None if start is None else shards.take(start),
            memory,
        )
        residual = None if found.residual is None else shards.whole(found.residual)
        return dataclasses.replace(found, value=shards.whole(found.value), residual=residual)
