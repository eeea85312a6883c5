"""What a solver is: it minimises m(x) = ½ xᵀ(A + D)x − bᵀx for a symmetric A known by its products."""

from __future__ import annotations

import dataclasses
import enum
from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from torch import Tensor

from hessfree.operators import SymmetricOperator

Map = Callable[[Tensor], Tensor]


class Status(enum.Enum):
    """Why a solver stopped, as a person reads it."""

    CONVERGED = "residual below the tolerance"
    PROGRESS = "the quadratic model stopped improving"
    ITERATIONS = "iteration limit"
    DIRECT = "solved directly"
    SHIFTED = "solved directly with more damping, without which the matrix is not positive definite"
    PRECONDITIONER = "the preconditioner alone"
    REUSED = "the preconditioner alone, step length reused"
    NEGATIVE_CURVATURE = "non-positive curvature; raise damping"
    NON_FINITE = "a product or the preconditioner gave a number that is not finite"
    INDEFINITE = "the preconditioner is not positive definite"
    NO_BETTER = "no better than the start"


@dataclasses.dataclass(frozen=True, eq=False)
class Solution:
    """What a solver found.

    Attributes:
        value: x, `[P]`; finite, and with m(x) no greater than at the start (which the preconditioner alone
            does not look at).
        residual: b − (A + D)x, `[P]`; None where the solver took no product from which to know it.
        status: Why the solver stopped.
        iterations: Iterations begun; where the last could not be finished, x is that of the one before.
        residuals: ‖b − (A + D)x‖ / ‖b‖ before the first and after each iteration; empty without `residual`.
        memory: What the solver's next call may be given: plain numbers, and tensors.
    """

    value: Tensor
    residual: Tensor | None
    status: Status
    iterations: int
    residuals: tuple[float, ...]
    memory: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def failed(self) -> bool:
        """Whether the numbers broke down, or there is nothing to step along."""
        return self.status is Status.NON_FINITE or (self.status is Status.INDEFINITE and self.iterations == 0)


class Solver(Protocol):
    """Solves (A + D) x = b. It holds settings only: what one call leaves for the next is in `Solution.memory`.

    Attributes:
        uses_preconditioner: Whether `solve` looks at its preconditioner at all.
    """

    @property
    @abstractmethod
    def uses_preconditioner(self) -> bool:
        """Whether `solve` looks at its preconditioner at all."""
        ...

    @abstractmethod
    def solve(
        self,
        operator: SymmetricOperator,
        rhs: Tensor,
        shift: float | Tensor,
        precondition: Map | None = None,
        start: Tensor | None = None,
        memory: Mapping[str, Any] | None = None,
    ) -> Solution:
        """Solve (A + diag(shift)) x = rhs.

        Args:
            operator: A, `[P, P]`.
            rhs: b, `[P]`.
            shift: The diagonal of D: a number, or `[P]`.
            precondition: Multiplies by an approximation of (A + D)⁻¹.
            start: First iterate, `[P]`; None leaves it to the solver.
            memory: `Solution.memory` of the last call; None or empty at first.

        Returns:
            The solution.
        """
        ...
