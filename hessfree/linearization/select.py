"""Choose a back end, test it, and fall back to one that works."""

from __future__ import annotations

from collections.abc import Callable

from hessfree.linearization.base import Linearization, LinearizationError, in_words
from hessfree.linearization.evaluation import Evaluation
from hessfree.linearization.functional import FunctionalLinearization
from hessfree.linearization.graph import GraphLinearization
from hessfree.linearization.selftest import find_fault
from hessfree.linearization.traced import TraceCache, linearize_calls
from hessfree.vectors import ParameterVector

BACKENDS = ("auto", "traced", "graph", "functional")
TRACING = ("auto", "traced")  # those that trace where the recorded calls can be evaluated again


def check_backend(backend: str) -> None:
    """Raise a ValueError unless `backend` is the name of one."""
    if backend not in BACKENDS:
        raise ValueError(f"linearization={backend!r} is no back end; choose one of {', '.join(map(repr, BACKENDS))}")


def check_compile(compile: bool, backend: str) -> None:
    """Raise a ValueError unless `compile` is a bool, and `backend` one whose products can be compiled."""
    if not isinstance(compile, bool):
        raise ValueError(f"{compile=} must be True or False")
    if compile and backend not in TRACING:
        raise ValueError(
            f"compile=True compiles traces, and linearization={backend!r} makes none; choose 'auto' or 'traced'"
        )


def choose(
    backend: str,
    evaluation: Evaluation,
    parameters: ParameterVector,
    traces: TraceCache,
    refuse: Callable[[str], None],
) -> Linearization | None:
    """Linearise with the back end asked for, or the next that serves the network and passes its test.

    Args:
        backend: One of `BACKENDS`; "auto" is "traced", and the autograd graph where that cannot serve.
        evaluation: The network and its samples.
        parameters: The parameters.
        traces: Where traces are kept.
        refuse: Told why, where a back end that was asked for, or that gave wrong numbers, is not used; unless it
            raises, the autograd graph takes its place.

    Returns:
        A linearisation that passed its test; None where a part of the batch meets another network.
    """
    if backend in TRACING:
        try:
            traced = _traced(evaluation, parameters, traces, refuse)
        except LinearizationError as error:
            if backend == "traced":
                refuse(f"linearization='traced' cannot be used: {error}")
        else:
            if traced is not None:
                return traced
    network = evaluation.network
    if network is None:
        return None
    reference = GraphLinearization(network.outputs, parameters)
    if backend != "functional":
        return reference
    try:
        candidate = FunctionalLinearization(network.calls, network.outputs, parameters)
        fault = find_fault(candidate, reference, parameters)
    except LinearizationError as error:
        fault = str(error)
    except Exception as error:
        fault = f"its products fail ({in_words(error)})"
    if fault is None:
        return candidate
    refuse(f"linearization='functional' cannot be used: {fault}")
    return reference


def _traced(
    evaluation: Evaluation, parameters: ParameterVector, traces: TraceCache, refuse: Callable[[str], None]
) -> Linearization | None:
    """Return a trace whose outputs are the recorded ones and whose products were compared once; None if it is wrong."""
    if not all(o.intact for o in evaluation.outputs):
        raise LinearizationError("the outputs were written into after the network returned them")
    with evaluation.world():
        traced = linearize_calls(
            evaluation.roots, evaluation.calls, evaluation.outputs, parameters, traces, evaluation.arguments
        )
    agrees = traced.recorded or evaluation.agrees(traced.space.views(traced.outputs))
    if agrees and traced.trusted and not traced.doubtful:
        return traced
    network = evaluation.network
    if network is None or not evaluation.finite():
        return None  # numbers that are not finite tell nothing of a trace
    fault: str | None = "its outputs differ from the network's"
    if agrees:
        reference = GraphLinearization(network.outputs, parameters)
        fault = find_fault(traced, reference, parameters, known=traced.trusted)
    if fault is None:
        traced.accept()
        return traced
    traced.reject(fault)
    names = " + ".join(dict.fromkeys(type(evaluation.roots[c.path[0]].module).__name__ for c in evaluation.calls))
    refuse(f"the trace of {names} is not used: {fault}")
    return None
