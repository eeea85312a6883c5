"""Momentum without a rate to tune: the exact minimiser of the quadratic model over a few directions."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from hessfree.operators import SymmetricOperator
from hessfree.solvers import Solution


class Direction(NamedTuple):
    """A direction with its curvature, so that the model's value along it costs nothing more.

    Attributes:
        value: d, `[P]`.
        bend: dᵀ(A + D)d, a scalar; None where nothing so far has measured it.
    """

    value: Tensor
    bend: Tensor | None


class Momentum(Protocol):
    """Combines the solver's direction with previous steps."""

    @property
    @abstractmethod
    def history(self) -> int:
        """How many previous steps `combine` wants."""
        ...

    @abstractmethod
    def combine(
        self,
        operator: SymmetricOperator,
        rhs: Tensor,
        shift: float | Tensor,
        solution: Solution,
        previous: Sequence[Tensor],
    ) -> Direction:
        """Return the direction to take.

        Args:
            operator: A, `[P, P]`.
            rhs: b, `[P]`.
            shift: The diagonal of D: a number, or `[P]`.
            solution: What the solver found for (A + D) x = b.
            previous: The previous steps, each `[P]`, the last one first; fewer than `history` at first.

        Returns:
            The direction.
        """
        ...


@dataclasses.dataclass(frozen=True)
class QuadraticModelMomentum(Momentum):
    """Minimise m(d) = ½ dᵀ(A + D)d − bᵀd over span{x, previous steps} (Martens & Grosse 2015, sec. 7).

    What the model needs is the curvature along and between its directions, for which G = JᵀHJ takes J alone, no Jᵀ:
    one forward pass a direction. The solver's own x needs none where it knows its residual r: (A + D)x = b − r. What
    was measured at earlier steps is of no use: A is the curvature at other parameters then, on fixed data too.

    Attributes:
        history: Previous steps; 1 is the method of the source.
    """

    history: int = 1

    def __post_init__(self) -> None:
        """Check the setting.

        Raises:
            ValueError: It is out of range.
        """
        if not (isinstance(self.history, int) and self.history >= 1):
            raise ValueError(
                f"history={self.history!r} is the number of previous steps: choose an integer, 1 or more, "
                "or momentum=None for none"
            )

    def combine(
        self,
        operator: SymmetricOperator,
        rhs: Tensor,
        shift: float | Tensor,
        solution: Solution,
        previous: Sequence[Tensor],
    ) -> Direction:
        """Return the minimiser (see `Momentum.combine`).

        Args:
            operator: A, `[P, P]`.
            rhs: b, `[P]`.
            shift: The diagonal of D: a number, or `[P]`.
            solution: What the solver found for (A + D) x = b.
            previous: The previous steps, each `[P]`, the last one first; fewer than `history` at first.

        Returns:
            The direction; the solver's own where the previous steps add nothing.
        """
        d = torch.stack([solution.value, *previous[: self.history]])
        # this small system is solved on the host in double precision: its directions are often nearly parallel
        system = torch.cat([_curvatures(operator, rhs, shift, solution, d), (d @ rhs)[:, None]], 1).to("cpu").double()
        matrix, b = 0.5 * (system[:, :-1] + system[:, :-1].T), system[:, -1]
        weights = _minimiser(matrix, b, 10 * torch.finfo(rhs.dtype).eps)
        if weights is None:
            return Direction(solution.value, matrix[0, 0])
        return Direction(weights.to(device=rhs.device, dtype=rhs.dtype) @ d, weights @ matrix @ weights)


def _curvatures(
    operator: SymmetricOperator, rhs: Tensor, shift: float | Tensor, solution: Solution, d: Tensor
) -> Tensor:
    """Return d (A + D) dᵀ for rows d, of which the first is the solver's x."""
    if solution.residual is None:
        return operator.quadratic_form(d) + (shift * d) @ d.T
    first = d @ (rhs - solution.residual)
    if len(d) == 1:
        return first[:, None]
    others = operator.quadratic_form(d[1:]) + (shift * d[1:]) @ d[1:].T
    return torch.cat([first[:, None], torch.cat([first[None, 1:], others])], 1)


def _minimiser(matrix: Tensor, b: Tensor, precision: float) -> Tensor | None:
    """Return the minimiser of q(w) = ½ wᵀ M w − bᵀ w over the directions in which M is safely positive.

    Args:
        matrix: M.
        b: The linear term.
        precision: Relative error of M, whose diagonal is scaled to ones first.

    Returns:
        w; None where it is no lower than the first direction alone, or the numbers are not finite.
    """
    if not bool(torch.isfinite(matrix).all() & torch.isfinite(b).all()):
        return None
    diagonal = matrix.diagonal().abs()
    scale = torch.where(diagonal > 0, diagonal.rsqrt(), 0)
    values, vectors = torch.linalg.eigh(matrix * scale[:, None] * scale)
    inverse = torch.where(values > precision, 1 / values, 0)
    w = scale * (vectors @ (inverse * (vectors.T @ (scale * b))))
    lower = 0.5 * w @ matrix @ w - b @ w < 0.5 * matrix[0, 0] - b[0]
    return w if bool(lower) else None
