"""Back ends that multiply by the Jacobian of the network's outputs in its parameters."""

from hessfree.linearization.base import Linearization, LinearizationError
from hessfree.linearization.functional import FunctionalLinearization
from hessfree.linearization.graph import GraphLinearization
from hessfree.linearization.select import build, call_model, check_backend, linearize, run_model
from hessfree.linearization.selftest import find_fault

__all__ = [
    "FunctionalLinearization",
    "GraphLinearization",
    "Linearization",
    "LinearizationError",
    "build",
    "call_model",
    "check_backend",
    "find_fault",
    "linearize",
    "run_model",
]
