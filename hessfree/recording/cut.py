"""Find where the network ends and the loss begins: the outputs z of the Gauss-Newton matrix JᵀHJ."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hessfree.recording.calls import Call, Output
from hessfree.recording.closure import Recording
from hessfree.recording.tail import Tail
from hessfree.vectors import ParameterVector

Path = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class CutPlace:
    """Where a cut was found, so that the next recording of the same structure can be cut there at once.

    Attributes:
        places: For each output, the path of its call in the tree and its index among the call's outputs;
            the path is None for an output given to `mark_outputs`.
        words: What a report says of it.
        warning: What the user should be told once; None mostly.
    """

    places: tuple[tuple[Path | None, int], ...]
    words: str
    warning: str | None = None

    @property
    def paths(self) -> frozenset[Path]:
        """The paths of the calls whose outputs are cut."""
        return frozenset(path for path, _ in self.places if path is not None)


@dataclasses.dataclass(frozen=True, eq=False)
class Cut:
    """The cut of one recording.

    Attributes:
        outputs: z, as many tensors as the loss uses directly; empty where no module explains the loss.
        calls: The outermost calls that these outputs came from, in order; empty if they were marked.
        tail: The loss as a function of z (and of the parameters it uses directly).
        place: Where it is.
    """

    outputs: tuple[Output, ...]
    calls: tuple[Call, ...]
    tail: Tail
    place: CutPlace


def find_cut(recording: Recording, parameters: ParameterVector, model: nn.Module | None = None) -> CutPlace:
    """Search the tree of calls from the outermost inward.

    A call whose outputs contain the loss, or in whose outputs the loss is linear, is transparent: the
    calls that it made are tried in its place. (Hence wrappers, `(logits, loss)` models and modules that
    return their loss need no special case.) Of the calls on a level only those outputs count that the loss
    uses directly.

    Args:
        recording: A closure's run.
        parameters: The parameters.
        model: Search only calls of this module.

    Returns:
        The place of the cut.
    """
    params = parameters.params
    if recording.marks:
        outputs = tuple(recording.marks)
        tail = Tail(recording.loss, outputs, params)
        used = [i for i, g in enumerate(tail.gradients) if g is not None]
        if used:
            return CutPlace(tuple((None, i) for i in used), "mark_outputs" + _rest(tail))
    level = list(recording.roots) if model is None else _calls_of(recording.roots, model)
    while level:
        level = [call for call in level if call.outputs]
        flat = [(call, i) for call in level for i in range(len(call.outputs))]
        if not flat:
            break
        tail = Tail(recording.loss, [call.outputs[i] for call, i in flat], params)
        curved = _curved(tail, recording, [call for call, _ in flat])
        used_calls = {id(call) for (call, _), g in zip(flat, tail.gradients, strict=True) if g is not None}
        transparent = [call for call in level if id(call) in used_calls and id(call) not in curved]
        deeper = [call for call in transparent if _has_outputs_below(call)]
        if not deeper:
            if curved:
                kept = [
                    (call, i) for (call, i), g in zip(flat, tail.gradients, strict=True) if g is not None
                ]
                names = " + ".join(dict.fromkeys(type(call.module).__name__ for call, _ in kept))
                return CutPlace(tuple((call.path, i) for call, i in kept), f"outputs of {names}{_rest(tail)}")
            break
        level = [new for call in level for new in (call.children if call in deeper else [call])]
    return _no_cut(recording, params)


def make_cut(recording: Recording, parameters: ParameterVector, place: CutPlace) -> Cut:
    """Cut `recording` at `place`.

    Args:
        recording: A closure's run, of the structure in which `place` was found.
        parameters: The parameters.
        place: Where `find_cut` found the cut.

    Returns:
        The cut.
    """
    calls: dict[Path, Call] = {}
    outputs = []
    for path, index in place.places:
        if path is None:
            outputs.append(recording.marks[index])
        else:
            calls[path] = call_at(recording.roots, path)
            outputs.append(calls[path].outputs[index])
    return Cut(tuple(outputs), tuple(calls.values()), Tail(recording.loss, outputs, parameters.params), place)


def explains_gradient(cut: Cut, recording: Recording, parameters: ParameterVector) -> bool:
    """Check the chain rule J_zᵀ d ell/dz + d ell/d theta = dL/d theta of the recorded loss.

    Args:
        cut: A cut of `recording`.
        recording: A closure's run.
        parameters: The parameters.

    Returns:
        Whether both sides agree to the square root of the parameters' precision.
    """
    params = parameters.params
    whole = _flat_grad(parameters, [recording.loss], None)
    used = [(o.edge, g.detach()) for o, g in zip(cut.outputs, cut.tail.gradients, strict=True) if g is not None]
    parts = parameters.flatten(cut.tail.direct)
    if used:
        parts = parts + _flat_grad(parameters, [e for e, _ in used], [g for _, g in used])
    precision = max(torch.finfo(t.dtype).eps for t in (*params, *cut.outputs))
    return bool((parts - whole).norm() <= precision**0.5 * whole.norm())


def _flat_grad(parameters: ParameterVector, outputs: Sequence[Any], weights: Sequence[Tensor] | None) -> Tensor:
    found = torch.autograd.grad(outputs, parameters.params, weights, retain_graph=True, allow_unused=True)
    return parameters.flatten(found)


def _curved(tail: Tail, recording: Recording, owners: Sequence[Call]) -> set[int]:
    """Return the ids of the calls in whose outputs the loss has a second derivative.

    The test multiplies the Hessian by one random vector; the loss itself among the outputs, or a loss that
    is linear in them, gives exact zeros.
    """
    generator = torch.Generator().manual_seed(0)
    w = [torch.randn(o.shape, generator=generator).to(device=o.device, dtype=o.dtype) for o in tail.outputs]
    found, _ = tail.product(w)
    curved = set()
    for call, o, h in zip(owners, tail.outputs, found, strict=True):
        holds_loss = o.edge.node is recording.loss.grad_fn and o.edge.output_nr == recording.loss.output_nr
        if h is not None and not holds_loss and bool(h.any()):
            curved.add(id(call))
    return curved


def _has_outputs_below(call: Call) -> bool:
    return any(child.outputs for child in call.children)


def _calls_of(roots: Sequence[Call], model: nn.Module) -> list[Call]:
    found = []
    for root in roots:
        if root.module is model:
            found.append(root)
        else:
            found.extend(_calls_of(root.children, model))
    return found


def call_at(roots: Sequence[Call], path: Path) -> Call:
    """Return the call at `path` of the tree that begins with `roots`."""
    call = roots[path[0]]
    for index in path[1:]:
        call = call.children[index]
    return call


def _rest(tail: Tail) -> str:
    return " + exact Hessian of what the loss adds to them" if tail.has_direct else ""


def _no_cut(recording: Recording, params: Sequence[Tensor]) -> CutPlace:
    tail = Tail(recording.loss, (), params)
    if tail.linear:
        return CutPlace(
            (),
            "none: the loss is linear in the parameters",
            "the loss is linear in the parameters, so it has no curvature: HessianFree takes damped gradient steps",
        )
    if recording.roots:
        why = "the loss is linear in the outputs of the modules (as an L1 loss is), or it is the output of one module"
    else:
        why = "the closure calls no module that owns the parameters"
    return CutPlace(
        (),
        "none: exact Hessian",
        f"no Gauss-Newton cut found: {why}. HessianFree uses the exact Hessian, which may be indefinite. If the loss "
        "is a smooth function of some tensor in the closure, wrap that tensor in hessfree.mark_outputs(...)",
    )
