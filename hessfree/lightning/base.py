"""The callback class of whichever Lightning is there: `lightning` or `pytorch_lightning`."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from typing import Any

NAMESPACES = ("lightning.pytorch", "pytorch_lightning")


def callback_classes() -> tuple[Any, ...]:
    """Return `Callback` of each namespace in use, so that isinstance() holds in both; else of the first installed.

    Returns:
        One or two classes. They have the same methods, none of which does anything.

    Raises:
        ImportError: Neither package is installed.
    """
    names = [name for name in NAMESPACES if name in sys.modules]
    if not names:
        names = [name for name in NAMESPACES if importlib.util.find_spec(name.partition(".")[0])][:1]
    if not names:
        raise ImportError(
            "hessfree.lightning needs Lightning, and neither lightning nor pytorch_lightning is installed: "
            "pip install 'hessfree[lightning]'"
        )
    return tuple(importlib.import_module(name).Callback for name in names)
