"""K-FAC: the Gauss-Newton block of a layer as a Kronecker product (Martens & Grosse 2015, sec. 3)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hessfree.preconditioners.base import Sample, State
from hessfree.preconditioners.cotangents import cotangents
from hessfree.preconditioners.kronecker import KroneckerBlock, Place, kronecker_inverse
from hessfree.preconditioners.layer_calls import LayerCalls, refusal, served_layers
from hessfree.preconditioners.layers import LAYERS
from hessfree.preconditioners.moments import InputMoments, check_moments
from hessfree.preconditioners.refresh import AveragedRefresh
from hessfree.preconditioners.shared import share_factors
from hessfree.solvers import Map
from hessfree.vectors import ParameterVector


@dataclasses.dataclass(frozen=True, kw_only=True)
class KFAC(AveragedRefresh):
    """G ≈ S ⊗ A for each layer, and a diagonal for every parameter of no layer that it knows.

    A is the mean of a aᵀ over the rows of the layer's input, with a one appended for the bias; S is the sum of
    s sᵀ over the rows of s = (∂z/∂output)ᵀ u, with E[u uᵀ] = H. Leading dimensions beyond the batch (tokens,
    positions, pixels of a convolution) and repeated calls count as further rows ("expand", Eschenhagen et al. 2023).
    Both factors are kept in eigenform, in which the damping may change freely. Where H = c·I, the last layer's S is
    exactly c times the number of rows, and nothing is sampled or decomposed for it.

    The layers are Linear, Conv1d to Conv3d with groups, Embedding, and scale and shift of LayerNorm, GroupNorm and
    BatchNorm. A layer whose parameters also act beside what it returns (the loss holds a derivative in its input, as in
    a physics-informed network) is declined, with a warning, and its parameters have the diagonal: s aᵀ would miss that.

    Attributes:
        factors: "sampled": one u of random signs an update. "exact": one u a column of H's root, as many
            backward passes as a sample has outputs (the diagonal stays sampled: a sign a sample).
        update_every: Steps between updates of the factors.
        warmup_updates: So many updates, the first ones, are made at every step.
        decay: Of the exponential moving average of the factors; a plain mean at first.
        damping_scale: M = G + `damping_scale`·λI: the preconditioner wants less damping than the system.
        power: Multiply by M to the power −`power`: 1 is K-FAC's inverse, ½ its square root.
        input_moments: By Linear layer (or its weight), the exact moments of its input over the data, where they are
            known: a first layer's input is the data's. A is then theirs instead of an average of batches, and is
            decomposed once. Batches estimate it worst where it matters most, along many small directions.
        wide: An input factor wider than this keeps `rank` eigenvectors and one value for the rest. It is then a
            plain mean over the updates, taken only at updates 1, 2, 4, ..., 64: its eigenform is the dear part.
        rank: Eigenvectors of a wide input factor.
    """

    factors: Literal["sampled", "exact"] = "sampled"
    damping_scale: float = 0.1
    input_moments: Mapping[nn.Linear | Tensor, InputMoments] | None = dataclasses.field(
        default=None, compare=False, repr=False
    )
    wide: int = 512
    rank: int = 64

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            ValueError: A setting is out of range.
        """
        super().__post_init__()
        if self.factors not in {"sampled", "exact"}:
            raise ValueError(f"factors={self.factors!r} must be 'sampled' or 'exact'")
        if not (isinstance(self.wide, int) and isinstance(self.rank, int) and 1 <= self.rank <= self.wide):
            raise ValueError(f"wide={self.wide!r} and rank={self.rank!r} must be integers with 1 <= rank <= wide")

        for key, moments in (self.input_moments or {}).items():
            check_moments(key, moments)

    @property
    def taps(self) -> tuple[type[nn.Module], ...]:
        """The types of modules whose inputs `update` needs."""
        return LAYERS

    def update(self, state: State, sample: Sample, step: int) -> tuple[State, str | None]:
        """Average the factors of `sample` into the state and take their eigenform.

        Args:
            state: What was learned so far; empty at first. Not changed.
            sample: The network on the curvature batch.
            step: Number of the step.

        Returns:
            The new state, and a warning where H has no root to sample from.
        """
        known = {_place(b): b for b in state.get("blocks", ())}
        updates = state.get("updates", 0) + 1
        layers, declined = served_layers(sample)
        covered = {i for layer in layers for i in layer.place.numbers}
        known = {place: b for place, b in known.items() if not set(place.numbers) & set(declined)}
        # a layer that this batch did not call (stochastic depth) keeps what is known of it
        resting = [b for place, b in known.items() if not covered & set(place.numbers)]
        covered.update(i for b in resting for i in _place(b).numbers)
        others = [i for i in range(len(sample.parameters.params)) if i not in covered]
        dtype = sample.parameters.dtype
        given = self._given(sample.parameters)

        def look() -> tuple[list[Tensor | None], list[Tensor], list[Tensor], str | None]:
            inner = [self._inner(layer, known.get(layer.place), given, updates, dtype) for layer in layers]
            return inner, *_measure(sample, self.factors, layers, others)

        inner, outer, squares, warning = sample.ranks.guard(look)
        measured = [i for i, layer in enumerate(layers) if inner[i] is not None and layer.place.weight not in given]
        if not share_factors(sample.ranks, layers, inner, outer, squares, measured):
            return state, "the ranks called different layers, and K-FAC keeps the factors it had"
        if not _finite([t for t in (*inner, *outer, *squares) if t is not None]):
            return state, "K-FAC met a number that is not finite in the network, and keeps the factors it had"
        keep = min(1 - 1 / updates, self.decay)
        blocks = list(resting)
        try:
            for layer, a, s in zip(layers, inner, outer, strict=True):
                exact = layer.place.weight in given
                blocks.append(self._block(layer, a, s, known.get(layer.place), keep, updates, exact).state())
        except torch.linalg.LinAlgError as error:
            return state, f"a factor of K-FAC has no eigenform, and the factors stay as they were ({error})"
        diagonal = dict(zip(others, squares, strict=True))
        for i in diagonal.keys() & state.get("diagonal", {}).keys():
            diagonal[i] = torch.lerp(diagonal[i], state["diagonal"][i], keep)
        learned = {"updates": updates, "step": step, "blocks": blocks, "diagonal": diagonal, "declined": declined}
        return learned, warning or (refusal(sample, declined) if declined else None)

    def _given(self, parameters: ParameterVector) -> dict[int, InputMoments]:
        """Return the moments that the user gave, by number of the weight."""
        found = {}
        for key, moments in (self.input_moments or {}).items():
            weight = key.weight if isinstance(key, nn.Linear) else key
            if weight not in parameters:
                raise ValueError(
                    f"input_moments names a weight of shape {list(weight.shape)} that is not among the trained "
                    "parameters: give the layer of the model that this optimizer trains (a copy is another layer)"
                )
            found[parameters.index_of(weight)] = moments
        return found

    def _inner(
        self,
        layer: LayerCalls,
        old: Mapping[str, Any] | None,
        given: Mapping[int, InputMoments],
        updates: int,
        dtype: torch.dtype,
    ) -> Tensor | None:
        """Return A as the data or this batch have it; None where what is known of it stays as it is."""
        moments = given.get(layer.place.weight)
        if moments is not None:
            a = moments.factor(layer.place.bias is not None).to(dtype=dtype, device=layer.calls[0].outputs[0].device)
            return None if old is not None and torch.equal(old["inner"], a) else a
        rests = updates > 64 or updates & (updates - 1) != 0
        return None if old is not None and old["tail"] is not None and rests else layer.inner(dtype)

    def _block(
        self,
        layer: LayerCalls,
        a: Tensor | None,
        s: Tensor,
        old: Mapping[str, Any] | None,
        keep: float,
        updates: int,
        exact: bool,
    ) -> KroneckerBlock:
        if old is not None and old["outer"].shape == s.shape:
            s = torch.lerp(s, old["outer"], keep)
        if a is None:
            assert old is not None
            return KroneckerBlock.of(layer.place, old["inner"], s, known=old)
        wide = a.ndim == 2 and a.shape[-1] > self.wide
        if old is not None and not exact:
            # a wide factor was last taken at half as many updates, so both halves weigh the same
            share = (updates.bit_length() - 1) / updates.bit_length() if wide else keep
            a.lerp_(old["inner"], share)  # in place: it is this batch's, and may be larger than the rest of the step
        return KroneckerBlock.of(layer.place, a, s, self.rank if wide else None)

    def inverse(self, state: State, parameters: ParameterVector, scale: float, shifts: Sequence[float]) -> Map | None:
        """Return r ↦ (k S ⊗ A + damping_scale·D)^(−power) r, layer by layer.

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
        return kronecker_inverse(state["blocks"], state["diagonal"], parameters, scale, shifts, self.power)

    def describe(self, state: State) -> str:
        """Return what a report says of it."""
        if not state:
            return "none yet"
        layers, others = len(state["blocks"]), len(state["diagonal"])
        power = "" if self.power == 1 else f" to the power {self.power:g}"
        words = f"K-FAC{power} of {layers} layer{'' if layers == 1 else 's'} ({self.factors} factors)"
        if others:
            words += f", diagonal of {others} other parameter{'' if others == 1 else 's'}"
        if state["declined"]:
            words += f" ({len(state['declined'])} of layers that are differentiated in their input)"
        return words


def _place(block: Mapping[str, Any]) -> Place:
    return Place(block["weight"], block["bias"], block["groups"], block["transposed"])


def _measure(
    sample: Sample, factors: str, layers: Sequence[LayerCalls], others: Sequence[int]
) -> tuple[list[Tensor], list[Tensor], str | None]:
    """Return S of each layer, an estimate of G's diagonal at each other parameter, and a warning."""
    parameters, form = sample.parameters, sample.hessian.form
    constant = form.constant if form is not None else None
    outer: list[Tensor | None] = [None] * len(layers)
    for i, layer in enumerate(layers):
        if layer.is_output and constant is not None and layer.place == Place(layer.place.weight, layer.place.bias):
            if all(isinstance(call.module, nn.Linear) for call in layer.calls):
                rows = sum(call.outputs[0].shape.numel() for call in layer.calls) // layer.width
                outer[i] = (constant * rows).to(parameters.dtype).expand(layer.width)
    squares = [torch.zeros(parameters.shapes[i], dtype=parameters.dtype, device=parameters.device) for i in others]
    sampled = [layer for layer, known in zip(layers, outer, strict=True) if known is None]
    sums: list[Tensor] = []
    drawn, warning = cotangents(sample, factors)
    for u in drawn:
        pulled, gradients = _pull_back(sample, u, sampled, others)
        new = [layer.outer(g, parameters.dtype) for layer, g in zip(sampled, pulled, strict=True)]
        sums = new if not sums else [old.add_(s) for old, s in zip(sums, new, strict=True)]
        for d, g in zip(squares, gradients, strict=True):
            if g is not None:
                d.addcmul_(g.to(d.dtype), g.to(d.dtype))
    found = iter(sums)
    return [next(found) if s is None else s for s in outer], squares, warning


def _pull_back(
    sample: Sample, u: Tensor, layers: Sequence[LayerCalls], others: Sequence[int]
) -> tuple[list[list[Tensor | None]], list[Tensor | None]]:
    """Return (∂z/∂output)ᵀu at each call of each layer, and Jᵀu at each other parameter."""
    targets: list[Any] = [call.outputs[0].edge for layer in layers for call in layer.calls]
    targets += [sample.parameters.params[i] for i in others]
    if not targets:
        return [], []
    found = torch.autograd.grad(
        [o.edge for o in sample.outputs],
        targets,
        sample.hessian.space.split(u),
        retain_graph=True,
        allow_unused=True,
    )
    pulled = iter(found)
    return [[next(pulled) for _ in layer.calls] for layer in layers], list(pulled)


def _finite(tensors: Sequence[Tensor]) -> bool:
    """Tell whether all numbers are finite: one wait for the device, and not one a tensor."""
    return not tensors or bool(torch.stack([torch.isfinite(t).all() for t in tensors]).all())
