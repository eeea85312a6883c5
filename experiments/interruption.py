"""Ctrl-C that waits for the end of a step."""

import signal
import threading
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(Exception):
    """The user asked to stop, and everything that is needed to go on is written."""


class Interruption:
    """A context in which the first Ctrl-C (or SIGTERM) only raises a flag; the second one acts as usual.

    Attributes:
        requested: The flag.
    """

    def __init__(self) -> None:
        """Lower the flag."""
        self.requested = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Interruption":
        """Take the signals over, where that is possible: outside the main thread Ctrl-C stays what it was.

        Returns:
            This object.
        """
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._request) for number in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        """Give the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        self.__exit__()
