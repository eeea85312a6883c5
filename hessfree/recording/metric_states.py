"""The states of torchmetrics metrics, taken down at first sight so that they can be put back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_Taken = dict[str, tuple[Any, Any]]  # attribute: the object, and a copy of what it holds


class MetricStates:
    """Which objects the attributes of metrics were, and what tensors, lists and dicts among them held.

    Metrics of one collection share their states, so that the object matters as well as the value.
    """

    def __init__(self) -> None:
        """Start with no metric seen."""
        self._states: dict[int, tuple[Any, _Taken]] = {}

    def see(self, metric: Any) -> None:
        """Take down `metric` unless it is known already.

        Args:
            metric: Called just before it changes.
        """
        if id(metric) not in self._states:
            taken = {name: (value, _copied(value)) for name, value in vars(metric).items()}
            self._states[id(metric)] = metric, taken

    def restore(self) -> None:
        """Put every metric back."""
        with torch.no_grad():
            for metric, taken in self._states.values():
                vars(metric).clear()
                for name, (value, copy) in taken.items():
                    _put_back(value, copy)
                    vars(metric)[name] = value


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    return value.copy() if isinstance(value, list | dict) else None


def _put_back(value: Any, copy: Any) -> None:
    if isinstance(value, Tensor):
        value.data.copy_(copy)
    elif isinstance(value, list):
        value[:] = copy
    elif isinstance(value, dict):
        value.clear()
        value.update(copy)
