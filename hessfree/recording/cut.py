"""Find where the network ends and the loss begins: the outputs z of the Gauss-Newton matrix JᵀHJ."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from hessfree.precision import unit
from hessfree.recording.calls import Call, Output
from hessfree.recording.checks import check_differentiable_again
from hessfree.recording.leaf_hooks import leaf_hooks_off
from hessfree.recording.tail import Tail
from hessfree.recording.trace import Trace
from hessfree.recording.twice import twice_differentiable
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
        calls: The outermost calls that these outputs came from, in order; empty if some of them were marked.
        tail: The loss as a function of z (and of the parameters it uses directly).
        place: Where it is.
    """

    outputs: tuple[Output, ...]
    calls: tuple[Call, ...]
    tail: Tail
    place: CutPlace


def find_cut(recording: Trace, parameters: ParameterVector, model: nn.Module | None = None) -> CutPlace:
    """Search the tree of calls from the outermost inward.

    A call in whose outputs the loss has no second derivative is transparent: the calls that it made are tried in
    its place. So is one that returns a number that the loss is linear in: a part of the loss. (Hence wrappers,
    `(logits, loss)` models, modules that return their loss, or objects that hide their tensors, need no special
    case.) Of the calls on a level only those outputs count that the loss uses directly. What was marked by
    `mark_outputs` counts on every level.

    Args:
        recording: A closure's run.
        parameters: The parameters.
        model: Search only calls of this module.

    Returns:
        The place of the cut.
    """
    check_differentiable_again(recording.loss)
    params = parameters.params
    marks = _distinct([_Candidate(None, i, o) for i, o in enumerate(recording.marks)])
    level = list(recording.roots) if model is None else _calls_of(recording.roots, model)
    while True:
        candidates = _distinct(marks + [_Candidate(call, i, o) for call in level for i, o in enumerate(call.outputs)])
        tail = Tail(recording.loss, [c.output for c in candidates], params)
        used = [c for c, g in zip(candidates, tail.gradients, strict=True) if g is not None]
        tail.forget_values()
        bends = _bends(tail)
        curved = {c.call for c, bend in zip(candidates, bends, strict=True) if bend}
        partial = {c.call for c, bend in zip(candidates, bends, strict=True) if not bend and c in used and c.is_number}
        deeper = [call for call in level if call.children and (call not in curved or call in partial)]
        if not deeper:
            break
        level = [new for call in level for new in (call.children if call in deeper else [call])]
    if not curved and not any(c.call is None for c in used):
        return _no_cut(recording, params, model)
    return CutPlace(tuple(c.place for c in used), _words(used, tail))


def make_cut(recording: Trace, parameters: ParameterVector, place: CutPlace) -> Cut:
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
    marked = any(path is None for path, _ in place.places)
    sources = () if marked else tuple(calls.values())
    return Cut(tuple(outputs), sources, Tail(recording.loss, outputs, parameters.params), place)


def explains_gradient(cut: Cut, recording: Trace, parameters: ParameterVector) -> bool:
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
    dtypes = {p.dtype for p in params} | {o.dtype for o in cut.outputs}
    precision = max(unit(dtype, parameters.device) for dtype in dtypes)
    return bool((parts - whole).norm() <= precision**0.5 * whole.norm())


def _flat_grad(parameters: ParameterVector, outputs: Sequence[Any], weights: Sequence[Tensor] | None) -> Tensor:
    with twice_differentiable(), leaf_hooks_off(parameters.params):
        found = torch.autograd.grad(outputs, parameters.params, weights, retain_graph=True, allow_unused=True)
    return parameters.flatten(found)


@dataclasses.dataclass(frozen=True, eq=False)
class _Candidate:
    call: Call | None  # None for an output that was marked
    index: int
    output: Output

    @property
    def place(self) -> tuple[Path | None, int]:
        return None if self.call is None else self.call.path, self.index

    @property
    def is_number(self) -> bool:
        return self.output.shape.numel() == 1 and self.call is not None


def _distinct(candidates: Sequence[_Candidate]) -> list[_Candidate]:
    """Drop what stands a second time: a tensor that is returned under two names is one output."""
    found: dict[tuple[Node, int], _Candidate] = {}
    for c in candidates:
        found.setdefault((c.output.edge.node, c.output.edge.output_nr), c)
    return list(found.values())


def _bends(tail: Tail) -> list[bool]:
    """Tell in which outputs the loss has a second derivative.

    The test multiplies the Hessian by one random vector; the loss itself among the outputs, or a loss that
    is linear in them, gives exact zeros.

    Args:
        tail: The loss behind the outputs.

    Returns:
        One answer an output.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    draws = (torch.randn(o.shape, generator=generator, device="cpu") for o in tail.outputs)
    w = [draw.to(device=o.device, dtype=o.dtype) for draw, o in zip(draws, tail.outputs, strict=True)]
    found, _ = tail.product(w)
    return [h is not None and bool(h.any()) for h in found]


def _words(used: Sequence[_Candidate], tail: Tail) -> str:
    names = ["mark_outputs"] if any(c.call is None for c in used) else []
    modules = dict.fromkeys(type(c.call.module).__name__ for c in used if c.call is not None)
    if modules:
        names.append("outputs of " + " + ".join(modules))
    if tail.has_direct:
        names.append("exact Hessian of what the loss adds to them")
    return " + ".join(names)


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


def _no_cut(recording: Trace, params: Sequence[Tensor], model: nn.Module | None) -> CutPlace:
    if Tail(recording.loss, (), params).linear:
        return CutPlace(
            (),
            "none: the loss is linear in the parameters",
            "the loss is linear in the parameters, so it has no curvature: HessianFree takes damped gradient steps",
        )
    if model is not None and not _calls_of(recording.roots, model):
        why = f"the closure does not call the {type(model).__name__} that was given as model"
    elif recording.roots:
        why = "the loss is linear in the outputs of the modules (as an L1 loss is), or it is the output of one module"
    else:
        why = "the closure calls no module that owns the parameters"
    return CutPlace(
        (),
        "none: exact Hessian",
        f"no Gauss-Newton cut found: {why}. HessianFree uses the exact Hessian, which may be indefinite. If the loss "
        "is a smooth function of some tensor in the closure, wrap that tensor in hessfree.mark_outputs(...)",
    )
