"""A progress bar that shows what the optimizer does; tqdm draws it."""

import time
from typing import Any

from experiments.training import Training

_EVERY_SECONDS = 0.2
_FORMAT = "{desc} {percentage:3.0f}%|{bar:30}| {postfix}, {remaining} left"


class Progress:
    """A bar on stderr for one run after the other; where stderr is no terminal there is none."""

    def __init__(self) -> None:
        """Begin without a bar."""
        self._bar: Any = None
        self._training: Training | None = None
        self._last = 0.0

    def watch(self, training: Training) -> None:
        """Bring the bar up to date: called after every step, drawn five times a second.

        Args:
            training: The run.
        """
        now = time.monotonic()
        if training is not self._training:
            self.close()
            self._open(training)
        elif now - self._last < _EVERY_SECONDS and not training.done:
            return
        self._last = now
        if self._bar is None or self._bar.disable:
            return
        self._bar.set_postfix_str(describe(training), refresh=False)
        self._bar.n = min(training.fraction, 1.0)
        self._bar.refresh()
        if training.done:
            self.close()

    def _open(self, training: Training) -> None:
        from tqdm import tqdm

        self._training = training
        self._bar = tqdm(desc=training.task.name, total=1.0, bar_format=_FORMAT, leave=False, disable=None)
        self._bar.initial = min(training.fraction, 1.0)  # of a resumed run: the time left is that of the rest

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.close()
        self._bar = self._training = None


def describe(training: Training) -> str:
    """Say in a few words how far a run is.

    Args:
        training: The run.

    Returns:
        Its steps and loss; the damping and the iterations of conjugate gradients, where the optimizer has them.
    """
    words = [f"step {training.steps}", f"loss {training.last_loss:.4g}"]
    report: Any = getattr(training.optimizer, "last_step", None)
    if report is not None:
        words += [f"damping {report.damping:.2g}", f"CG {report.iterations}"]
    return ", ".join(words)
