"""Run a closure once, keep its loss with its graph and its tree of calls, cut it, and replay it."""

from hessfree.recording.accumulation import BackwardCounter
from hessfree.recording.calls import Call, CallTree, Output, Owners
from hessfree.recording.closure import Closure, Recording, World, mark_outputs, record, replay, twice_differentiable
from hessfree.recording.cut import Cut, CutPlace, Path, call_at, explains_gradient, find_cut, make_cut
from hessfree.recording.random_state import RandomState
from hessfree.recording.tail import Tail

__all__ = [
    "BackwardCounter",
    "Call",
    "CallTree",
    "Closure",
    "Cut",
    "CutPlace",
    "Output",
    "Owners",
    "Path",
    "RandomState",
    "Recording",
    "Tail",
    "World",
    "call_at",
    "explains_gradient",
    "find_cut",
    "make_cut",
    "mark_outputs",
    "record",
    "replay",
    "twice_differentiable",
]
