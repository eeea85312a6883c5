"""The calls that share a layer's weight, as K-FAC sees them; and the layers that it is not right for."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from hessfree.preconditioners.base import Sample
from hessfree.preconditioners.kronecker import Place
from hessfree.preconditioners.layers import Part, parts_of
from hessfree.recording import Call
from hessfree.rows import Uses


@dataclasses.dataclass(eq=False)
class LayerCalls:
    """All calls of the layers that share one weight.

    Attributes:
        place: Which parameters the block stands for.
        width: Rows of the weight, seen as a matrix.
        calls: The calls.
        parts: How each call's layer looks.
        owns_bias: Whether each call adds the block's bias: two layers may share the weight and not the bias.
        is_output: What the layer returns is z itself, or at several calls parts of z, and leads to no other part of z.
        rows: The rows that `inner` was the mean over.
    """

    place: Place
    width: int
    calls: list[Call]
    parts: list[Part]
    owns_bias: list[bool]
    is_output: bool = False
    rows: int = 0

    def inner(self, dtype: torch.dtype) -> Tensor:
        """Return A, the mean of a aᵀ over the rows of all calls.

        Args:
            dtype: Of the factor.

        Returns:
            `[in (+1), in (+1)]`, with a leading G where G > 1; of one-hot rows the diagonal.
        """
        found, one_hot = [], False
        for call, part, owns in zip(self.calls, self.parts, self.owns_bias, strict=True):
            rows = part.rows(_input_of(call).detach())
            one_hot, a = rows.one_hot, rows.inner.to(dtype)
            if self.place.bias is not None:
                a = torch.cat([a, a.new_full((*a.shape[:-1], 1), float(owns))], -1)
            found.append(a)
        if one_hot:
            a = torch.cat(found)
            self.rows = len(a)
            return a.mean(0)
        a = torch.cat(found, 1)
        self.rows = a.shape[1]
        a = a.mT @ a / a.shape[1]
        return a if self.place.groups > 1 else a[0]

    def outer(self, gradients: Sequence[Tensor | None], dtype: torch.dtype) -> Tensor:
        """Return S, the sum of s sᵀ over the rows of all calls.

        Args:
            gradients: At what each call returned; None for zeros.
            dtype: Of the factor.

        Returns:
            `[out, out]`, with a leading G where G > 1.
        """
        rows = []
        for call, part, g in zip(self.calls, self.parts, gradients, strict=True):
            out = call.outputs[0]
            g = torch.zeros(out.shape, dtype=out.dtype, device=out.device) if g is None else g
            rows.append(part.rows(_input_of(call).detach()).outer(g).to(dtype))
        s = torch.cat(rows, 1)
        s = s.mT @ s
        return s if self.place.groups > 1 else s[0]


def _input_of(call: Call) -> Tensor:
    return call.inputs[0] if call.inputs else call.keywords["input"]


def _group(sample: Sample) -> list[LayerCalls]:
    """Collect the layers by weight, in the order of their first call."""
    parameters = sample.parameters
    edges = {(o.edge.node, o.edge.output_nr) for o in sample.outputs}
    layers: dict[int, LayerCalls] = {}
    taken: set[int] = set()
    for call in (call for root in sample.calls for call in root.walk()):
        if not call.outputs or not (call.inputs or "input" in call.keywords):
            continue  # what was not kept, a diagonal has to do for
        for part in parts_of(call.module):
            if part.weight not in parameters:
                continue
            weight = parameters.index_of(part.weight)
            bias = parameters.index_of(part.bias) if part.bias is not None and part.bias in parameters else None
            if weight not in layers:  # two weights may share one bias, which then belongs to the first
                place = Place(weight, None if bias in taken else bias, part.groups, part.transposed)
                shape = part.weight.shape
                width = shape[1] if part.transposed else shape[0] // part.groups
                layers[weight] = LayerCalls(place, width, [], [], [])
                taken.update(() if bias is None else (bias,))
            layer = layers[weight]
            if (layer.place.groups, layer.place.transposed) != (part.groups, part.transposed):
                continue  # an embedding that is also the last layer's weight: the first use decides
            layer.calls.append(call)
            layer.parts.append(part)
            layer.owns_bias.append(bias is not None and layer.place.bias == bias)
            out = call.outputs[0].edge
            returned = (out.node, out.output_nr) in edges
            layer.is_output = returned and (layer.is_output or len(layer.calls) == 1)
    return list(layers.values())


def served_layers(sample: Sample) -> tuple[list[LayerCalls], list[int]]:
    """Tell the layers that K-FAC is right for from those that it is not.

    Args:
        sample: The network on the curvature batch.

    Returns:
        The former, in the order of their first calls, and the numbers of the parameters of the latter.
    """
    layers, params, uses, returned = _group(sample), sample.parameters.params, Uses(sample.outputs), _returned(sample)
    served: list[LayerCalls] = []
    declined: set[int] = set()
    for layer in layers:
        # in a rollout, what a call returned is a part of z and goes into the next call as well
        ends = [call.outputs[0].edge for call in layer.calls]
        layer.is_output &= not any(use.output == e.output_nr for e in ends for use in uses.of(e.node))
        if any(uses.pass_by(params[i], returned[i]) for i in layer.place.numbers):
            declined.update(layer.place.numbers)
        else:
            served.append(layer)
    return served, sorted(declined)


def _returned(sample: Sample) -> dict[int, list[GradientEdge]]:
    """Return, by number of a parameter, what the calls of the layers that hold it returned."""
    found: dict[int, list[GradientEdge]] = {}
    for call in (call for root in sample.calls for call in root.walk() if call.outputs):
        held = {p for part in parts_of(call.module) for p in (part.weight, part.bias) if p is not None}
        for p in held:
            if p in sample.parameters:
                found.setdefault(sample.parameters.index_of(p), []).append(call.outputs[0].edge)
    return found


def refusal(sample: Sample, declined: Sequence[int]) -> str:
    """Say why parameters have a diagonal.

    Args:
        sample: The network on the curvature batch.
        declined: Their numbers.

    Returns:
        The warning.
    """
    shapes = ", ".join(str(list(sample.parameters.shapes[i])) for i in declined[:4])
    shapes += ", ..." if len(declined) > 4 else ""
    return (
        f"K-FAC declines layers with parameters of shapes {shapes}: the outputs depend on them beside what the layers "
        "returned (a derivative in the input inside the loss, as in physics-informed networks, or a weight used by "
        "hand). They have the diagonal of G instead; Woodbury(samples=...) is exact there for as many samples as it "
        "is given"
    )
