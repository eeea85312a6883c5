"""Traces by signature, the least recently used thrown away first."""

from __future__ import annotations

import collections
import warnings
import weakref
from typing import Any

import torch
from torch import nn

from hessfree.linearization.base import LinearizationError
from hessfree.linearization.traced.capture import first_line
from hessfree.linearization.traced.compiling import CompilationError
from hessfree.linearization.traced.network import Network
from hessfree.linearization.traced.signature import signature
from hessfree.linearization.traced.trace import NotFiniteError, Trace
from hessfree.vectors import ParameterVector

# a network whose signature is new at every call (texts of every length, a counter among its attributes) would
# be traced at every step, which takes longer than the step
MOST_MISSES_IN_A_ROW = 8


class TraceCache:
    """Holds a few traces, and remembers which networks cannot be traced.

    Attributes:
        capacity: How many signatures it remembers.
        hits: How often a trace was there.
        misses: How often it had to be made, or failed.
        evictions: How many were thrown away.
        compiles: Whether traces are handed to torch.compile; no longer after a first failure, of which one warning
            tells.
        keeps_autocast: Whether networks are traced under the autocast of their call, and not in the parameters'
            own precision.
    """

    def __init__(self, capacity: int = 8, compile: bool = False, keeps_autocast: bool = False) -> None:
        """Start empty.

        Args:
            capacity: How many signatures to remember.
            compile: Whether to hand traces to torch.compile.
            keeps_autocast: Whether to trace networks under the autocast of their call.

        Raises:
            ValueError: It is less than one.
        """
        if capacity < 1:
            raise ValueError(f"{capacity=} must be 1 or more")
        self.capacity = capacity
        self.compiles = compile
        self.keeps_autocast = keeps_autocast
        self.hits = self.misses = self.evictions = 0
        self._in_a_row: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()
        self._entries: collections.OrderedDict[Any, tuple[weakref.ref[nn.Module], Trace | str]] = (
            collections.OrderedDict()
        )

    def __len__(self) -> int:
        """Return how many signatures are remembered."""
        return len(self._entries)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle as an empty cache: a trace belongs to one process and one module object."""
        return TraceCache, (self.capacity, self.compiles, self.keeps_autocast)

    def get(self, network: Network, parameters: ParameterVector) -> Trace:
        """Return the trace of `network`, made now unless one of the same signature is there.

        Args:
            network: The network.
            parameters: The parameters.

        Returns:
            A trace that may be evaluated at the present parameters and inputs.

        Raises:
            LinearizationError: The network cannot be traced, now or at an earlier attempt.
        """
        key = signature(network, parameters)
        found = self._entries.get(key)
        if found is not None and found[0]() is network.module and _valid(found[1]):
            self.hits += 1
            self._in_a_row[network.module] = 0
            self._entries.move_to_end(key)
            trace = found[1]
        else:
            trace = self._make(network, parameters, key)
        if isinstance(trace, str):
            raise LinearizationError(trace)
        if trace.fault is not None:
            raise LinearizationError(trace.fault)
        return trace

    def _make(self, network: Network, parameters: ParameterVector, key: Any) -> Trace | str:
        self.misses += 1
        in_a_row = self._in_a_row[network.module] = self._in_a_row.get(network.module, 0) + 1
        if in_a_row > MOST_MISSES_IN_A_ROW:
            raise LinearizationError(
                f"the last {MOST_MISSES_IN_A_ROW} calls of {type(network.module).__name__} differed in shapes or "
                "settings, and tracing each anew takes longer than a step"
            )
        trace: Trace | str
        try:
            trace = Trace(network, parameters)
        except NotFiniteError:  # tells nothing of the network's next evaluation
            raise
        except torch.OutOfMemoryError as error:  # nor does this: the next one may find more
            raise LinearizationError(f"there is no memory to trace the network: {first_line(error)}") from error
        except LinearizationError as error:
            trace = str(error)
        except Exception as error:  # tracing is semi-private, and there is always another back end
            trace = f"the network cannot be traced: {first_line(error)}"
        if isinstance(trace, Trace) and self.compiles:
            self._compile(trace, network, parameters)
        self._entries[key] = (weakref.ref(network.module), trace)
        self._entries.move_to_end(key)
        while len(self._entries) > self.capacity:
            self._entries.popitem(last=False)
            self.evictions += 1
        return trace

    def _compile(self, trace: Trace, network: Network, parameters: ParameterVector) -> None:
        try:
            trace.compile(network, parameters)
        except CompilationError as error:
            self.compiles = False  # the next signature would fail alike, after as long
            warnings.warn(
                f"compile=True is not used: {error}. The traced operators run as they are, to the same result",
                UserWarning,
                stacklevel=2,
            )


_of_models: weakref.WeakKeyDictionary[nn.Module, dict[bool, TraceCache]] = weakref.WeakKeyDictionary()


def traces_of(model: nn.Module, compile: bool = False) -> TraceCache:
    """Return the traces of `model` that live as long as it does.

    An operator is often built again after an update, or on another batch, and then it traces nothing. (An optimizer
    keeps traces of its own, whose life is its own.)

    Args:
        model: The model.
        compile: Whether those that are handed to torch.compile are wanted.

    Returns:
        The cache.
    """
    caches = _of_models.setdefault(model, {})
    return caches.setdefault(compile, TraceCache(compile=compile))


def _valid(trace: Trace | str) -> bool:
    return isinstance(trace, str) or all(constant.unchanged() for constant in trace.constants)
