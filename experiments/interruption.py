"""Ctrl-C that waits for the end of a step."""

import contextlib
import os
import signal
import threading
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_STDERR = 2  # its number: the object may be in use by what the signal interrupts
_ANSWER = b"\nstops after this step; a second Ctrl-C stops at once\n"


class Interrupted(Exception):
    """The user asked to stop, and everything that is needed to go on is written."""


class Interruption:
    """A context in which the first Ctrl-C (or SIGTERM) only raises a flag, and says so; the second one acts as usual.

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

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Give the signals back.

        Args:
            kind: Of the exception that ends the context, if one does.

        Raises:
            KeyboardInterrupt: If the second Ctrl-C was turned into SystemExit, as Lightning's Trainer does.
        """
        self._give_back()
        if kind is SystemExit and self.requested:
            raise KeyboardInterrupt

    def _give_back(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        self._give_back()
        with contextlib.suppress(OSError):  # nobody listens: stop all the same
            os.write(_STDERR, _ANSWER)
