"""Back ends that multiply by the Jacobian of the network's outputs in its parameters."""

from hessfree.linearization.base import Linearization, LinearizationError
from hessfree.linearization.chunked import (
    ChunkedLinearization,
    check_microbatch,
    chunks_of,
    linearize_in_chunks,
)
from hessfree.linearization.divided import run_divided
from hessfree.linearization.evaluation import Evaluation, batch_size, single_root, without_samples
from hessfree.linearization.functional import FunctionalLinearization
from hessfree.linearization.graph import GraphLinearization
from hessfree.linearization.models import call_model, linearize, linearize_recorded, run_model
from hessfree.linearization.select import BACKENDS, check_backend, check_compile, choose
from hessfree.linearization.selftest import find_fault
from hessfree.linearization.traced import TraceCache, TracedLinearization

__all__ = [
    "BACKENDS",
    "ChunkedLinearization",
    "Evaluation",
    "FunctionalLinearization",
    "GraphLinearization",
    "Linearization",
    "LinearizationError",
    "TraceCache",
    "TracedLinearization",
    "batch_size",
    "call_model",
    "check_backend",
    "check_compile",
    "check_microbatch",
    "choose",
    "chunks_of",
    "find_fault",
    "linearize",
    "linearize_in_chunks",
    "linearize_recorded",
    "run_divided",
    "run_model",
    "single_root",
    "without_samples",
]
