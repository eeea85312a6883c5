"""When a run gets no further."""

from __future__ import annotations

import dataclasses
import math

from hessfree.report import StepReport


@dataclasses.dataclass(frozen=True)
class Stagnation:
    """So many steps in a row that gain nothing.

    Attributes:
        patience: Steps in a row; None waits for ever.
        tolerance: What counts as no gain: a decrease of the step's own loss by less than this part of it.
    """

    patience: int | None
    tolerance: float

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            ValueError: One is out of range.
        """
        whole = isinstance(self.patience, int) and not isinstance(self.patience, bool)
        if self.patience is not None and not (whole and self.patience >= 1):
            raise ValueError(
                f"patience={self.patience!r} counts steps: choose an integer >= 1, or None to go on always"
            )
        if not 0 <= self.tolerance < math.inf:
            raise ValueError(
                f"tolerance={self.tolerance!r} is a part of the loss: choose a finite number >= 0, like 1e-6"
            )

    def gains_nothing(self, report: StepReport) -> bool:
        """Tell whether a step was rejected, or its loss fell by next to nothing.

        The loss after the step counts where it was evaluated, and the quadratic model's prediction elsewhere. A step
        of which neither is known has gained something.

        Args:
            report: Of the step.

        Returns:
            True for a step that another like it would not be worth taking.
        """
        if not report.accepted:
            return True
        change = report.loss_after - report.loss
        if math.isnan(change):
            change = report.predicted_change
        return -change <= self.tolerance * abs(report.loss)

    def count(self, before: int, report: StepReport) -> int:
        """Return how many steps in a row have gained nothing, `report`'s included.

        Args:
            before: How many without it.
            report: Of the last step.
        """
        return before + 1 if self.gains_nothing(report) else 0

    def reached(self, count: int) -> bool:
        """Tell whether to stop after `count` such steps."""
        return self.patience is not None and count >= self.patience
