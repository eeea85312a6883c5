"""Back ends that multiply by the Jacobian of the network's outputs in its parameters."""

from hessfree.linearization.base import Linearization, LinearizationError
from hessfree.linearization.functional import FunctionalLinearization
from hessfree.linearization.graph import GraphLinearization
from hessfree.linearization.select import TRACING, build, call_model, check_backend, check_compile, linearize, run_model
from hessfree.linearization.selftest import find_fault
from hessfree.linearization.traced import TraceCache, TracedLinearization

__all__ = [
    "TRACING",
    "FunctionalLinearization",
    "GraphLinearization",
    "Linearization",
    "LinearizationError",
    "TraceCache",
    "TracedLinearization",
    "build",
    "call_model",
    "check_backend",
    "check_compile",
    "find_fault",
    "linearize",
    "run_model",
]
