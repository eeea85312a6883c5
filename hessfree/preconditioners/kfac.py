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
from hessfree.vectors import FlatSpace, ParameterVector


@dataclasses.dataclass(frozen=True)
class KFAC:
    """G ≈ S ⊗ A for each Linear layer, and a diagonal for every other parameter.

    A is the mean of a aᵀ over the rows of the layer's input, with a one appended for the bias; S is the sum of
    s sᵀ over the rows of s = (∂z/∂output)ᵀ u, with E[u uᵀ] = H. Leading dimensions beyond the batch (tokens,
    positions) and repeated calls count as further rows ("expand", Eschenhagen et al. 2023). Both factors are
    kept in eigenform, in which the damping may change freely.

    Attributes:
        factors: "sampled": one u of random signs an update. "exact": one u a column of H's root, as many
            backward passes as a sample has outputs (the diagonal stays sampled: a sign a sample).
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
        known = list(state.get("blocks", ()))
        layers = _group(sample)
        covered = {i for layer in layers for i in (layer.weight, layer.bias)}
        # a layer that this batch did not call (stochastic depth) keeps what is known of it
        resting = [b for b in known if not covered & ({b["weight"], b["bias"]} - {None})]
        covered.update(i for b in resting for i in (b["weight"], b["bias"]))
        others = [i for i in range(len(sample.parameters.params)) if i not in covered]
        inner = [layer.inner(sample.parameters.dtype) for layer in layers]
        outer, squares, warning = _measure(sample, self.factors, layers, others)
        if not all(bool(torch.isfinite(t).all()) for t in (*inner, *outer, *squares)):
            return state, "K-FAC met a number that is not finite in the network, and keeps the factors it had"
        updates = state.get("updates", 0) + 1
        keep = min(1 - 1 / updates, self.decay)
        old = {(b["weight"], b["bias"]): (b["inner"], b["outer"]) for b in known}
        blocks = list(resting)
        for layer, a, s in zip(layers, inner, outer, strict=True):
            before = old.get((layer.weight, layer.bias), (a, s))
            means = (torch.lerp(new, was, keep) for new, was in zip((a, s), before, strict=True))
            blocks.append(KroneckerBlock.of(layer.weight, layer.bias, *means).state())
        diagonal = dict(zip(others, squares, strict=True))
        for i in diagonal.keys() & state.get("diagonal", {}).keys():
            diagonal[i] = torch.lerp(diagonal[i], state["diagonal"][i], keep)
        return {"updates": updates, "step": step, "blocks": blocks, "diagonal": diagonal}, warning

    def inverse(self, state: State, parameters: ParameterVector, scale: float, shifts: Sequence[float]) -> Map | None:
        """Return r ↦ (k S ⊗ A + damping_scale·D)⁻¹ r, layer by layer.

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
        layers, others = len(state["blocks"]), len(state["diagonal"])
        words = f"K-FAC of {layers} Linear layer{'' if layers == 1 else 's'} ({self.factors} factors)"
        return words if not others else f"{words}, diagonal of {others} other parameter{'' if others == 1 else 's'}"


@dataclasses.dataclass(eq=False)
class _Layer:
    """All calls of the Linear layers that share one weight."""

    weight: int
    bias: int | None
    calls: list[Call]
    owns_bias: list[bool]  # one a call: two layers may share the weight and not the bias

    def inner(self, dtype: torch.dtype) -> Tensor:
        """Return A, the mean of a aᵀ over the rows of all calls."""
        parts = []
        for call, owns in zip(self.calls, self.owns_bias, strict=True):
            inputs = _input_of(call)
            part = inputs.detach().reshape(-1, inputs.shape[-1]).to(dtype)
            if self.bias is not None:
                part = torch.cat([part, part.new_full((part.shape[0], 1), float(owns))], 1)
            parts.append(part)
        rows = torch.cat(parts)
        return rows.T @ rows / rows.shape[0]


def _input_of(call: Call) -> Tensor:
    return call.inputs[0] if call.inputs else call.keywords["input"]


def _group(sample: Sample) -> list[_Layer]:
    """Collect the Linear layers by weight, in the order of their first call."""
    parameters = sample.parameters
    layers: dict[int, _Layer] = {}
    taken: set[int] = set()
    for call in (call for root in sample.calls for call in root.walk()):
        module = call.module
        if not isinstance(module, nn.Linear) or not call.outputs or module.weight not in parameters:
            continue
        if not call.inputs and "input" not in call.keywords:
            continue  # the input was not kept: the diagonal has to do
        weight = parameters.index_of(module.weight)
        bias = parameters.index_of(module.bias) if module.bias is not None and module.bias in parameters else None
        if weight not in layers:  # two weights may share one bias, which then belongs to the first
            layers[weight] = _Layer(weight, None if bias in taken else bias, [], [])
            taken.update(() if bias is None else (bias,))
        layers[weight].calls.append(call)
        layers[weight].owns_bias.append(bias is not None and layers[weight].bias == bias)
    return list(layers.values())


def _measure(
    sample: Sample, factors: str, layers: Sequence[_Layer], others: Sequence[int]
) -> tuple[list[Tensor], list[Tensor], str | None]:
    """Return S of each layer, an estimate of G's diagonal at each other parameter, and a warning."""
    parameters = sample.parameters
    sizes = [parameters.shapes[layer.weight][0] for layer in layers]
    outer = [torch.zeros(n, n, dtype=parameters.dtype, device=parameters.device) for n in sizes]
    squares = [torch.zeros(parameters.shapes[i], dtype=parameters.dtype, device=parameters.device) for i in others]
    cotangents, warning = _cotangents(sample, factors)
    for u in cotangents:
        rows, gradients = _pull_back(sample, u, layers, others)
        for s, r in zip(outer, rows, strict=True):
            s.addmm_(r.T, r)
        for d, g in zip(squares, gradients, strict=True):
            if g is not None:
                d.addcmul_(g.to(d.dtype), g.to(d.dtype))
    return outer, squares, warning


def _cotangents(sample: Sample, factors: str) -> tuple[Iterator[Tensor], str | None]:
    """Return vectors u `[Z]` whose u uᵀ sum to H (on average, and within a sample), and a warning if not."""
    form, space = sample.hessian.form, sample.hessian.space
    generator = sample.generator()
    if form is None:
        # sqrt(N) times the mean loss's own gradients: u uᵀ has the empirical Fisher matrix as its mean
        own = space.flatten(sample.gradients) * math.sqrt(sample.samples)
        return iter([own * _signs(space, generator)]), (
            "the Hessian of the loss in the outputs has no structure that can be sampled; K-FAC uses the loss's own "
            "output gradients instead (the empirical Fisher)"
        )
    if factors == "exact":
        return (u * _signs(space, generator) for u in form.columns(space)), None
    return iter([form.sample(generator, space)]), None


def _signs(space: FlatSpace, generator: torch.Generator) -> Tensor:
    """Return a random sign for each sample, `[Z]`: samples summed in one backward pass must not correlate."""
    longest = max((shape[0] for shape in space.shapes if shape), default=1)
    signs = torch.randint(0, 2, (longest,), generator=generator, device=space.device).to(space.dtype) * 2 - 1
    rows = [shape[0] if shape else 1 for shape in space.shapes]
    pieces = zip(rows, space.numels, strict=True)
    return torch.cat([signs[:n].repeat_interleave(numel // max(n, 1)) for n, numel in pieces])


def _pull_back(
    sample: Sample, u: Tensor, layers: Sequence[_Layer], others: Sequence[int]
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Return (∂z/∂output)ᵀu at each layer as rows `[R, out]`, and Jᵀu at each other parameter."""
    targets: list[Any] = [call.outputs[0].edge for layer in layers for call in layer.calls]
    targets += [sample.parameters.params[i] for i in others]
    found = torch.autograd.grad(
        [o.edge for o in sample.outputs],
        targets,
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
        rows.append(torch.cat(parts).to(sample.parameters.dtype))
    return rows, list(pulled)
