"""Choose a back end, test it, and fall back to one that works."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from hessfree.linearization.base import Linearization, LinearizationError
from hessfree.linearization.functional import FunctionalLinearization
from hessfree.linearization.graph import GraphLinearization
from hessfree.linearization.selftest import find_fault
from hessfree.recording import Call, CallTree, Output, Owners, twice_differentiable
from hessfree.vectors import ParameterVector

BACKENDS = ("auto", "graph", "functional")


def check_backend(backend: str) -> None:
    """Raise a ValueError unless `backend` is the name of one."""
    if backend not in BACKENDS:
        raise ValueError(f"linearization={backend!r} is no back end; choose one of {', '.join(map(repr, BACKENDS))}")


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
        ValueError: `backend` is unknown, or the model has no parameters or no differentiable output.
    """
    check_backend(backend)
    parameters = ParameterVector([p for p in model.parameters() if p.requires_grad])
    call = run_model(model, inputs, parameters)[0]
    if not call.outputs:
        raise ValueError(f"no output of {type(model).__name__} depends on its parameters; is everything detached?")

    def refuse(message: str) -> None:
        raise LinearizationError(message)

    return build(backend, call.outputs, [call], parameters, refuse)


def run_model(model: nn.Module, inputs: Any, parameters: ParameterVector) -> tuple[Call, Any]:
    """Call `model` once and record the call.

    Args:
        model: The module.
        inputs: A tensor, a tuple of positional arguments, or a dict of keyword arguments.
        parameters: The parameters.

    Returns:
        The call, and what the model returned.
    """
    args = inputs if isinstance(inputs, tuple) else () if isinstance(inputs, dict) else (inputs,)
    keywords = inputs if isinstance(inputs, dict) else {}
    tree = CallTree(Owners(parameters), parameters.device, lambda _: True, lambda _: True)
    with torch.enable_grad(), twice_differentiable(), tree:
        returned = model(*args, **keywords)
    return tree.roots[0], returned
