"""K-FAC: the Gauss-Newton block of a Linear layer as a Kronecker product (Martens & Grosse 2015, sec. 3)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hessfree.preconditioners.base import Sample, State
from hessfree.preconditioners.kronecker import KroneckerBlock, kronecker_inverse
from hessfree.recording import Call
from hessfree.solvers import Map
from hessfree.vectors import ParameterVector


@dataclasses.dataclass(frozen=True)
class KFAC:
    """G ≈ A ⊗ S for each Linear layer, and a diagonal for every other parameter.

    A is the mean of a aᵀ over the rows of the layer's input, with a one appended for the bias; S is the sum of
    s sᵀ over the rows of s = (∂z/∂output)ᵀ u, with E[u uᵀ] = H. Leading dimensions beyond the batch (tokens,
    positions) and repeated calls count as further rows ("expand", Eschenhagen et al. 2023). Both factors are
    kept in eigenform, in which the damping may change freely.

    Attributes:
        factors: "sampled": one u of random signs an update. "exact": one u a column of H's root, as many
            backward passes as a sample has outputs.
        update_every: Update the factors every so many steps (and at each of the first three).
        decay: Of the exponential moving average of the factors; a plain mean at first.
        damping_scale: M = G + `damping_scale`·λI: the preconditioner wants less damping than the system.
    """

    factors: Literal["sampled", "exact"] = "sampled"
    update_every: int = 5
    decay: float = 0.95
    damping_scale: float = 0.1

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            ValueError: A setting is out of range.
        """
        if self.factors not in {"sampled", "exact"}:
            raise ValueError(f"factors={self.factors!r} must be 'sampled' or 'exact'")
        if not (isinstance(self.update_every, int) and self.update_every >= 1):
            raise ValueError(f"update_every={self.update_every!r} must be an integer, 1 or more")
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay={self.decay!r} must satisfy 0 <= decay < 1")
        if not 0 < self.damping_scale < math.inf:
            raise ValueError(f"damping_scale={self.damping_scale!r} must be positive and finite")

    @property
    def taps(self) -> tuple[type[nn.Module], ...]:
        """The types of modules whose inputs `update` needs."""
        return (nn.Linear,)

    def due(self, state: State, step: int) -> bool:
        """Tell whether the factors are to be updated at step number `step`."""
        return not state or state["updates"] < 3 or step - state["step"] >= self.update_every

    def update(self, state: State, sample: Sample, step: int) -> tuple[State, str | None]:
        """Average the factors of `sample` into the state and take their eigenform.

        Args:
            state: What was learned so far; empty at first. Not changed.
            sample: The network on the curvature batch.
            step: Number of the step.

        Returns:
            The new state, and a warning where H has no root to sample from.
        """
        updates = state.get("updates", 0) + 1
        keep = min(1 - 1 / updates, self.decay)
        layers = _group(sample)
        covered = {i for layer in layers for i in (layer.weight, layer.bias) if i is not None}
        others = [i for i in range(len(sample.parameters.params)) if i not in covered]
        outer = [layer.zero_factor(sample) for layer in layers]
        squares = [torch.zeros_like(sample.parameters.params[i]) for i in others]
        cotangents, warning = _cotangents(sample, self.factors)
        for u in cotangents:
            found = _pull_back(sample, u, layers, others)
            for s, rows in zip(outer, found[0], strict=True):
                s.addmm_(rows.T, rows)
            for d, g in zip(squares, found[1], strict=True):
                if g is not None:
                    d.addcmul_(g, g)
        known = {(b["weight"], b["bias"]): b for b in state.get("blocks", ())}
        blocks = []
        for layer, s in zip(layers, outer, strict=True):
            before = known.get((layer.weight, layer.bias))
            weight = keep if before is not None else 0.0
            blocks.append(layer.block(before, s, weight).state())
        old = state.get("diagonal", {})
        diagonal = {i: torch.lerp(d, old[i], keep) if i in old else d for i, d in zip(others, squares, strict=True)}
        return {"updates": updates, "step": step, "blocks": blocks, "diagonal": diagonal}, warning

    def inverse(self, state: State, parameters: ParameterVector, scale: float, shifts: Sequence[float]) -> Map | None:
        """Return r ↦ (k A ⊗ S + damping_scale·D)⁻¹ r, layer by layer.

        Args:
            state: What was learned.
            parameters: The parameters.
            scale: k.
            shifts: The diagonal of D, one number a parameter.

        Returns:
            The map on `[P]` vectors.
        """
        if not state:
            return None
        shifts = [self.damping_scale * s for s in shifts]
        return kronecker_inverse(state["blocks"], state["diagonal"], parameters, scale, shifts)

    def describe(self, state: State) -> str:
        """Return what a report says of it."""
        if not state:
            return "none yet"
        names = f"K-FAC of {len(state['blocks'])} Linear layers ({self.factors} factors)"
        count = len(state["diagonal"])
        return names if not count else f"{names}, diagonal of {count} other parameters"


@dataclasses.dataclass(eq=False)
class _Layer:
    """All calls of the Linear layers that share one weight."""

    weight: int
    bias: int | None
    calls: list[Call]

    def zero_factor(self, sample: Sample) -> Tensor:
        weight = sample.parameters.params[self.weight]
        return torch.zeros(weight.shape[0], weight.shape[0], dtype=weight.dtype, device=weight.device)

    def block(self, before: dict[str, Any] | None, outer: Tensor, keep: float) -> KroneckerBlock:
        rows = torch.cat([_as_tensor(call).detach().reshape(-1, _as_tensor(call).shape[-1]) for call in self.calls])
        rows = rows.to(outer.dtype)
        if self.bias is not None:
            rows = torch.cat([rows, rows.new_ones(rows.shape[0], 1)], 1)
        inner = rows.T @ rows / rows.shape[0]
        if before is not None:
            inner = torch.lerp(inner, before["inner"], keep)
            outer = torch.lerp(outer, before["outer"], keep)
        return KroneckerBlock.of(self.weight, self.bias, inner, outer)


def _as_tensor(call: Call) -> Tensor:
    return call.inputs[0] if call.inputs else call.keywords["input"]


def _group(sample: Sample) -> list[_Layer]:
    """Collect the Linear layers by weight, in the order of their first call."""
    parameters = sample.parameters
    layers: dict[int, _Layer] = {}
    for root in sample.calls:
        for call in root.walk():
            module = call.module
            if not isinstance(module, nn.Linear) or not call.outputs or module.weight not in parameters:
                continue
            weight = parameters.index_of(module.weight)
            bias = parameters.index_of(module.bias) if module.bias is not None and module.bias in parameters else None
            layer = layers.setdefault(weight, _Layer(weight, bias, []))
            if layer.bias == bias:
                layer.calls.append(call)
    taken: set[int] = set()
    for layer in layers.values():  # two weights may share one bias, which then belongs to the first
        if layer.bias in taken:
            layer.bias = None
        if layer.bias is not None:
            taken.add(layer.bias)
    return list(layers.values())


def _cotangents(sample: Sample, factors: str) -> tuple[Iterator[Tensor], str | None]:
    form, space = sample.hessian.form, sample.hessian.space
    if form is None:
        # sqrt(N) times the mean loss's own gradients, with a random sign a sample: u uᵀ has the empirical Fisher as mean
        signed = []
        for g, shape in zip(sample.gradients, space.shapes, strict=True):
            rows = shape[:1] + (1,) * (len(shape) - 1)
            signs = torch.randint(0, 2, rows, generator=sample.generator(), device=space.device)
            signed.append(None if g is None else g.detach() * (2 * signs - 1) * math.sqrt(sample.samples))
        own = space.flatten(signed)
        return iter([own]), (
            "the Hessian of the loss in the outputs has no structure that can be sampled; K-FAC uses the loss's own "
            "output gradients instead (the empirical Fisher)"
        )
    if factors == "exact":
        return form.columns(space), None
    return iter([form.sample(sample.generator(), space)]), None


def _pull_back(
    sample: Sample, u: Tensor, layers: Sequence[_Layer], others: Sequence[int]
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Return (∂z/∂output)ᵀu at each layer as rows `[R, out]`, and Jᵀu at each other parameter."""
    edges = [call.outputs[0].edge for layer in layers for call in layer.calls]
    params = [sample.parameters.params[i] for i in others]
    if not edges and not params:
        return [], []
    found = torch.autograd.grad(
        [o.edge for o in sample.outputs],
        [*edges, *params],
        sample.hessian.space.split(u),
        retain_graph=True,
        allow_unused=True,
    )
    pulled = iter(found)
    rows = []
    for layer in layers:
        parts = []
        for call in layer.calls:
            g, out = next(pulled), call.outputs[0]
            g = torch.zeros(out.shape, dtype=out.dtype, device=out.device) if g is None else g
            parts.append(g.reshape(-1, out.shape[-1]))
        dtype = sample.parameters.params[layer.weight].dtype
        rows.append(torch.cat(parts).to(dtype))
    return rows, list(pulled)
