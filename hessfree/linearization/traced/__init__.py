"""The back end that traces a network once and replays its linear maps."""

from hessfree.linearization.traced.cache import TraceCache, traces_of
from hessfree.linearization.traced.linearization import TracedLinearization
from hessfree.linearization.traced.stacking import StackedLinearization, linearize_calls

__all__ = ["StackedLinearization", "TraceCache", "TracedLinearization", "linearize_calls", "traces_of"]
