"""A logger that writes nothing, and otherwise answers as the one it stands for."""

from __future__ import annotations

from typing import Any


class Silence:
    """Stands for any object that is only told things: every attribute, item and call of it is silence again."""

    def __getattr__(self, name: str) -> Silence:
        """Return silence for any attribute."""
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Silence:
        """Take any arguments, and do nothing."""
        return self

    def __getitem__(self, key: Any) -> Silence:
        """Return silence for any key."""
        return self

    def __setitem__(self, key: Any, value: Any) -> None:
        """Forget the value."""


class SilentLogger:
    """A Lightning logger without a voice: `experiment` and every `log_...` method do nothing."""

    def __init__(self, logger: Any) -> None:
        """Stand for `logger`.

        Args:
            logger: A logger of Lightning or of Fabric.
        """
        self._logger = logger

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """The class of the logger, so that isinstance() goes on to work."""
        return type(self._logger)

    @property
    def experiment(self) -> Silence:
        """What the user would write to."""
        return Silence()

    def __getattr__(self, name: str) -> Any:
        """Return the logger's attribute; silence for a method that logs."""
        value = getattr(self._logger, name)
        return Silence() if name.startswith("log_") and callable(value) else value
