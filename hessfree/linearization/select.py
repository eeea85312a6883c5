"""Choose a back end, test it, and fall back to one that works."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from hessfree.linearization.base import Linearization, LinearizationError, in_words
from hessfree.linearization.functional import FunctionalLinearization
from hessfree.linearization.graph import GraphLinearization
from hessfree.linearization.selftest import find_fault
from hessfree.recording import Call, CallTree, Output, Owners, twice_differentiable
from hessfree.vectors import ParameterVector

BACKENDS = ("auto", "traced", "graph", "functional")
TRACING = ("auto", "traced")  # those that trace where a recorded call can be evaluated again


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


def build(
    backend: str,
    outputs: Sequence[Output],
    calls: Sequence[Call],
    parameters: ParameterVector,
    warn: Callable[[str], None],
) -> Linearization:
    """Linearise `outputs` with the back end asked for, or else with the autograd graph.

    Args:
        backend: One of `BACKENDS`; "auto" is the best that serves every network.
        outputs: The z.
        calls: The calls that they came from.
        parameters: The parameters.
        warn: Told why where the back end asked for cannot be used.

    Returns:
        A linearisation that passed its test.
    """
    reference = GraphLinearization(outputs, parameters)
    if backend != "functional":
        return reference
    try:
        candidate = FunctionalLinearization(calls, outputs, parameters)
        fault = find_fault(candidate, reference, parameters)
    except LinearizationError as error:
        fault = str(error)
    except Exception as error:
        fault = f"its products fail ({in_words(error)})"
    if fault is None:
        return candidate
    warn(f"linearization='functional' cannot be used: {fault}; the autograd graph is used instead")
    return reference


def linearize(model: nn.Module, inputs: Any, *, backend: str = "auto") -> Linearization:
    """Linearise `model` at its present parameters.

    Args:
        model: A module with parameters that require grad; vectors `[P]` follow their order.
        inputs: A tensor, a tuple of positional arguments, or a dict of keyword arguments.
        backend: "auto", "graph" or "functional".

    Returns:
        J by products: `.jvp(v)`, `.vjp(u)`, and the outputs z as `.outputs`.

    Raises:
        LinearizationError: `backend` cannot linearise the model, or is wrong about it.
    """
    check_backend(backend)
    parameters = ParameterVector([p for p in model.parameters() if p.requires_grad])
    call = run_model(model, inputs, parameters)

    def refuse(message: str) -> None:
        raise LinearizationError(message)

    return build(backend, call.outputs, [call], parameters, refuse)


def run_model(model: nn.Module, inputs: Any, parameters: ParameterVector) -> Call:
    """Call `model` once and record the call.

    Args:
        model: The module.
        inputs: A tensor, a tuple of positional arguments, or a dict of keyword arguments.
        parameters: The parameters.

    Returns:
        The call.

    Raises:
        ValueError: Nothing that the model returned depends on the parameters.
    """
    tree = CallTree(Owners(parameters), parameters.device, lambda _: True, lambda _: True)
    with torch.enable_grad(), twice_differentiable(), tree:
        call_model(model, inputs)
    call = tree.roots[0]
    if not call.outputs:
        raise ValueError(
            f"no output of {type(model).__name__} is a real tensor that depends on its parameters; is everything "
            "detached?"
        )
    return call


def call_model(model: nn.Module, inputs: Any) -> Any:
    """Call `model` on a tensor, a tuple of positional arguments, or a dict of keyword arguments."""
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)
