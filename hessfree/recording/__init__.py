"""Run a closure once, keep its loss with its graph and its tree of calls, cut it, and replay it."""

from hessfree.recording.accumulation import BackwardCounter
from hessfree.recording.autocast import Autocast, autocast_as, autocast_now
from hessfree.recording.buffers import BufferStates
from hessfree.recording.calls import Call, CallTree, Output, Owners, space_of
from hessfree.recording.checks import check_closure, check_reached, not_moved, not_repeated
from hessfree.recording.closure import Closure, Recording, record, replay
from hessfree.recording.cut import Cut, CutPlace, Path, call_at, explains_gradient, find_cut, make_cut
from hessfree.recording.leaf_hooks import leaf_hooks_off
from hessfree.recording.onlookers import is_replaying, unseen
from hessfree.recording.random_state import GeneratorStates, RandomState
from hessfree.recording.tail import Tail
from hessfree.recording.together import Together
from hessfree.recording.trace import Trace, collect_marks, mark_outputs, trace_loss
from hessfree.recording.twice import twice_differentiable
from hessfree.recording.world import World

__all__ = [
    "Autocast",
    "BackwardCounter",
    "BufferStates",
    "Call",
    "CallTree",
    "Closure",
    "Cut",
    "CutPlace",
    "GeneratorStates",
    "Output",
    "Owners",
    "Path",
    "RandomState",
    "Recording",
    "Tail",
    "Together",
    "Trace",
    "World",
    "autocast_as",
    "autocast_now",
    "call_at",
    "check_closure",
    "check_reached",
    "collect_marks",
    "explains_gradient",
    "find_cut",
    "is_replaying",
    "leaf_hooks_off",
    "make_cut",
    "mark_outputs",
    "not_moved",
    "not_repeated",
    "record",
    "replay",
    "space_of",
    "trace_loss",
    "twice_differentiable",
    "unseen",
]
