"""A budget of seconds whose course can be repeated step by step.

Where the length of steps follows the clock, no two runs are alike: at the same step one is a little later than the
other. Here the share of the budget that is spent rises in stairs, and the steps at which it rose are kept. A run that
is given them makes the same steps of the same lengths, and its losses are the same to the last bit.
"""

import bisect
from collections.abc import Sequence

from experiments.records import Budget

STAIRS = 400


class Pace(Budget):
    """Seconds, in stairs of 1/400 of the budget.

    Attributes:
        reached: For each stair the number of steps after which it was reached, ascending.
    """

    def __init__(self, seconds: float, reached: Sequence[int] | None = None) -> None:
        """Start at the bottom.

        Args:
            seconds: Of the whole budget.
            reached: From an earlier run, all `STAIRS` of them: its course is repeated, whatever the clock says; None:
                the clock decides.

        Raises:
            ValueError: If the seconds are no budget, or if the stairs are not all there.
        """
        super().__init__(seconds)
        if reached is not None and (len(reached) != STAIRS or list(reached) != sorted(reached)):
            raise ValueError(f"reached has {len(reached)} entries; {STAIRS} that ascend are the course of a whole run")
        self.reached = [] if reached is None else list(reached)
        self._repeats = reached is not None

    def fraction(self, seconds: float, steps: int) -> float:
        """Give the share that is spent.

        Args:
            seconds: Seconds of training.
            steps: Steps made.

        Returns:
            A multiple of 1/400, from 0 to 1: the last stair that the seconds reach, or that the earlier run had
            reached after so many steps.
        """
        if self._repeats:
            return bisect.bisect_right(self.reached, steps) / STAIRS
        while len(self.reached) < STAIRS and seconds / self.seconds >= (len(self.reached) + 1) / STAIRS:
            self.reached.append(steps)
        return len(self.reached) / STAIRS
