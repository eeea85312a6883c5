"""The back end that traces a network once and replays its linear maps."""

from hessfree.linearization.traced.cache import TraceCache
from hessfree.linearization.traced.linearization import TracedLinearization

__all__ = ["TraceCache", "TracedLinearization"]
