"""The public `linearize(model, inputs)`, and what operators share with it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from hessfree.linearization.base import Linearization, LinearizationError
from hessfree.linearization.chunked import linearize_in_chunks
from hessfree.linearization.evaluation import Evaluation, Recorded, arguments_of
from hessfree.linearization.select import check_backend, check_compile, choose
from hessfree.linearization.traced import traces_of
from hessfree.recording import Call, CallTree, Output, Owners, twice_differentiable
from hessfree.vectors import ParameterVector


def linearize(model: nn.Module, inputs: Any, *, backend: str = "auto", compile: bool = False) -> Linearization:
    """Linearise `model` at its present parameters.

    Args:
        model: A module with parameters that require grad; vectors `[P]` follow their order.
        inputs: A tensor, a tuple of positional arguments, or a dict of keyword arguments.
        backend: "auto", "traced", "graph" or "functional"; "auto" is "traced" where the model can be traced, else
            "graph". A trace takes 0.1 to a few seconds, and serves later calls with inputs of the same shapes as long
            as the model lives.
        compile: Hand the trace to torch.compile, which takes seconds to a minute; where that fails, one warning says
            why and the trace runs as it is.

    Returns:
        J by products: `.jvp(v)`, `.vjp(u)`, and the outputs z as `.outputs`.

    Raises:
        LinearizationError: `backend` was asked for by name and cannot linearise the model, or is wrong about it.
    """
    check_backend(backend)
    parameters = ParameterVector([p for p in model.parameters() if p.requires_grad])
    tree = run_model(model, inputs, parameters)
    call = tree.roots[0]
    return linearize_recorded(backend, model, tree, call.outputs, [call], parameters, compile=compile)


def linearize_recorded(
    backend: str,
    model: nn.Module,
    recorded: Recorded,
    outputs: Sequence[Output],
    calls: Sequence[Call],
    parameters: ParameterVector,
    chunks: Sequence[slice] = (),
    compile: bool = False,
) -> Linearization:
    """Linearise outputs of a recorded run of `model`, with the traces that live as long as it.

    Args:
        backend: The name of a back end.
        model: The model.
        recorded: The run.
        outputs: z.
        calls: The calls that z came from; empty if z was marked.
        parameters: The parameters.
        chunks: The samples that products take at a time; empty for all.
        compile: Whether to hand traces to torch.compile.

    Returns:
        The linearisation.

    Raises:
        LinearizationError: A back end was asked for by name and cannot be used.
    """
    check_compile(compile, backend)

    def evaluation_of(rows: slice | None, precise: bool = True) -> Evaluation:
        return Evaluation(recorded, outputs, calls, parameters, rows, precise=precise)

    how = parameters, traces_of(model, compile), _refusal(backend)
    if chunks:
        chunked = linearize_in_chunks(backend, chunks, evaluation_of, *how)
        if chunked is None:
            raise LinearizationError(
                f"{type(model).__name__} gives other outputs when it is called again on the same samples; use "
                "microbatch=None"
            )
        return chunked
    # what ran under autocast, and gives other outputs when evaluated again, is taken as it is
    found = choose(backend, evaluation_of(None), *how) or choose(backend, evaluation_of(None, False), *how)
    assert found is not None  # only another evaluation meets another network
    return found


def _refusal(backend: str) -> Callable[[str], None]:
    def refuse(why: str) -> None:
        if backend != "auto":
            raise LinearizationError(f"{why}; use linearization='auto' or 'graph'")
        warnings.warn(f"{why}; the autograd graph is used instead", stacklevel=2)

    return refuse


def run_model(model: nn.Module, inputs: Any, parameters: ParameterVector) -> CallTree:
    """Call `model` once and record the call.

    Args:
        model: The module.
        inputs: A tensor, a tuple of positional arguments, or a dict of keyword arguments.
        parameters: The parameters.

    Returns:
        The calls: one outermost call, which returned something.

    Raises:
        ValueError: Nothing that the model returned depends on the parameters.
    """
    tree = CallTree(Owners(parameters), parameters.device, lambda _: True, lambda _: True)
    with torch.enable_grad(), twice_differentiable(), tree:
        call_model(model, inputs)
    if not tree.roots[0].outputs:
        raise ValueError(
            f"no output of {type(model).__name__} is a real tensor that depends on its parameters; is everything "
            "detached?"
        )
    return tree


def call_model(model: nn.Module, inputs: Any) -> Any:
    """Call `model` on a tensor, a tuple of positional arguments, or a dict of keyword arguments."""
    positional, keywords = arguments_of(inputs)
    return model(*positional, **keywords)
