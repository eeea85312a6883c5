"""When to compute the residual of conjugate gradients anew (van der Vorst & Ye 2000, sec. 3).

The recurrence r ← r − αq goes to zero whatever rounding does to x; b − (A + D)x stops at the sum of the roundings
since the recurrence was last right. Replacing r late puts rounding itself in its place and spoils the convergence;
replacing it as long as it is much greater than the drift, and then no more, does not.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Drift:
    """Bounds the drift of r, and sums x in two parts, so that late iterations add the rounding of small sums only.

    Attributes:
        base: x at the last replacement, `[P]`.
        part: What was added since, `[P]`.
    """

    def __init__(self, x: Tensor, r: Tensor) -> None:
        """Begin where r was just computed from x."""
        self.base, self.part = x, torch.zeros_like(x)
        self._unit = torch.finfo(x.dtype).eps / 2
        self._norm = torch.zeros_like(r @ r)
        self._bound = self._rounding(x, r)
        self._first: Tensor | None = None

    def moved(self, p: Tensor, q: Tensor, length: Tensor) -> Tensor:
        """Add an iteration's move.

        Args:
            p: Its direction, `[P]`.
            q: (A + D)p, `[P]`.
            length: How far it went.

        Returns:
            The new x.
        """
        self.part = torch.addcmul(self.part, p, length)
        self._norm = torch.maximum(self._norm, q.norm() / p.norm())  # the norm of A + D is at least this
        return self.base + self.part

    def due(self, x: Tensor, before: Tensor, r: Tensor) -> bool:
        """Tell whether the drift has just become √u of the residual, with u the unit of rounding.

        Args:
            x: The iterate.
            before: The residual before the iteration.
            r: The residual after it, by recurrence.

        Returns:
            Whether to call `replaced`.
        """
        if self._first is None:  # now that something is known of the matrix
            self._first = self._bound = self._rounding(self.base, before)
        last, self._bound = self._bound, self._bound + self._rounding(x, r)
        level = self._unit**0.5
        crossed = (last <= level * before.norm()) & (self._bound > level * r.norm())
        return bool(crossed & (self._bound > 1.1 * self._first))

    def replaced(self, x: Tensor, r: Tensor) -> None:
        """Begin anew where r was just computed from x."""
        self.base, self.part = x, torch.zeros_like(x)
        self._first = self._bound = self._rounding(x, r)

    def _rounding(self, x: Tensor, r: Tensor) -> Tensor:
        return self._unit * (self._norm * x.norm() + r.norm())
