"""K-FAC plus the exact curvature of a few samples, inverted by the Woodbury identity."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hessfree.preconditioners.base import Sample, State
from hessfree.preconditioners.jacobian_rows import jacobian_rows
from hessfree.preconditioners.kfac import KFAC
from hessfree.preconditioners.kronecker import eigh, matrix_of, write_matrix
from hessfree.preconditioners.refresh import Refresh, check_count, check_positive
from hessfree.preconditioners.shared import share_of_samples, share_rows
from hessfree.rows import add_gram
from hessfree.solvers import Map
from hessfree.vectors import ParameterVector


@dataclasses.dataclass(frozen=True, kw_only=True)
class Woodbury(Refresh):
    """M = τ·K + UᵀU, with K the damped K-FAC matrix and UᵀU the Gauss-Newton matrix of a part of the samples.

    K-FAC knows every layer roughly; UᵀU knows all of them together, but along no more directions than it has rows.
    The inverse needs the Gram matrix I + U(τK)⁻¹Uᵀ. For Linear layers, where a row of U is s aᵀ, it is a product of
    two small Gram matrices and U is never formed. K is damped factor by factor (Martens & Grosse 2015, sec. 6.3),
    and its damping is that of the last update.

    Made for fixed data, where it takes the place of the solver's iterations: `CG(max_iterations=0)` with
    `QuadraticModelMomentum`. On streaming data it loses to K-FAC alone.

    Attributes:
        samples: Samples that U is made of: one row an output where that makes at most 4·`samples` rows, else rows of
            random signs, `samples` in all. None for all of the batch. Where every sample has a row an output, M is
            G + `damping_scale`·λI itself, and K plays no part.
        weight: τ.
        kfac: How K is learned.
        update_every: Steps between updates of both parts.
        warmup_updates: So many updates, the first ones, are made at every step.
        damping_scale: τK holds `damping_scale`·λ: the preconditioner wants less damping than the system.
    """

    samples: int | None = 256
    weight: float = 0.1
    kfac: KFAC = KFAC()
    update_every: int = 10
    damping_scale: float = 0.01

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            ValueError: A setting is out of range.
        """
        super().__post_init__()
        if self.samples is not None:
            check_count(self, "samples")
        check_positive(self, "weight")
        check_positive(self, "damping_scale")

    @property
    def taps(self) -> tuple[type[nn.Module], ...]:
        """The types of modules whose inputs `update` needs."""
        return self.kfac.taps

    def update(self, state: State, sample: Sample, step: int) -> tuple[State, str | None]:
        """Learn K and U anew and factor the Gram matrix.

        Args:
            state: What was learned so far; empty at first. Not changed.
            sample: The network on the curvature batch.
            step: Number of the step.

        Returns:
            The new state, and a warning where H has no root, or the Gram matrix no factor.
        """
        kfac, warning = self.kfac.update(state.get("kfac", {}), sample, step)
        if not kfac:
            return state, warning
        shifts = sample.shifts or [0.0] * len(sample.parameters.params)
        shifts = [self.damping_scale * s for s in shifts]
        count = share_of_samples(sample, self.samples)
        found = share_rows(sample.ranks, lambda: jacobian_rows(sample, count, kfac["blocks"], kfac["diagonal"]))
        if found is None:
            return state, "the ranks called layers in different ways, and the Woodbury preconditioner stays as it was"
        rows, complete = found
        # K stands for the samples that U does not hold; where there are none, M is G + λI itself
        factor = 0.0 if complete else self.weight * sample.scale
        if complete:  # less than the rounding of G would leave the Gram matrix without a Cholesky factor
            least = torch.finfo(sample.parameters.dtype).eps * sum(_energy(row) for row in rows)
            shifts = [max(s, least) for s in shifts]
        try:
            parts = [_damped(block, factor, shifts[block["weight"]]) for block in kfac["blocks"]]
        except torch.linalg.LinAlgError as error:
            return state, f"a factor of the Woodbury preconditioner has no inverse; it stays as it was ({error})"
        for i, d in kfac["diagonal"].items():
            parts.append({"index": i, "inverse": 1 / _positive(factor * d + shifts[i])})
        parts = [part | row for part, row in zip(parts, rows, strict=True)]
        cholesky, failed = torch.linalg.cholesky_ex(_gram(parts))
        if int(failed) or not bool(torch.isfinite(cholesky).all()):
            return state, "the Gram matrix of the Woodbury preconditioner has no Cholesky factor; it stays as it was"
        updates = state.get("updates", 0) + 1
        learned = {"updates": updates, "step": step, "kfac": kfac, "parts": parts, "factor": cholesky}
        return learned | {"complete": complete}, warning

    def inverse(self, state: State, parameters: ParameterVector, scale: float, shifts: Sequence[float]) -> Map | None:
        """Return r ↦ K'⁻¹r − K'⁻¹Uᵀ(I + U K'⁻¹ Uᵀ)⁻¹ U K'⁻¹ r with K' = τK, as of the last update.

        Args:
            state: What was learned.
            parameters: The parameters.
            scale: Not used.
            shifts: Not used.

        Returns:
            The map on `[P]` vectors.
        """
        if not state:
            return None
        parts, factor = state["parts"], state["factor"]

        def apply(r: Tensor) -> Tensor:
            pieces = parameters.views(r)
            base = [_solve(part, _part_of(part, pieces)) for part in parts]
            projected = [_project(part, x) for part, x in zip(parts, base, strict=True)]
            y = torch.cholesky_solve(torch.stack(projected).sum(0).unsqueeze(1), factor)[:, 0]
            out: list[Tensor | None] = [None] * len(pieces)
            for part, x in zip(parts, base, strict=True):
                x = x - _solve(part, _combine(part, y, x.shape))
                if "index" in part:
                    out[part["index"]] = x
                else:
                    write_matrix(part, x, out)
            return parameters.flatten(out)

        return apply

    def describe(self, state: State) -> str:
        """Return what a report says of it."""
        if not state:
            return "none yet"
        rows = f"Woodbury: {state['factor'].shape[0]} rows of the Jacobian"
        return f"{rows} (all samples)" if state["complete"] else f"{rows} on {self.kfac.describe(state['kfac'])}"


def _positive(t: Tensor) -> Tensor:
    """Return `t` with zeros (no curvature and no damping) lifted to the rounding of its largest entry."""
    precision = torch.finfo(t.dtype)
    return t.clamp_min(float(t.max()) * precision.eps + precision.tiny) if t.numel() else t


def _damped(block: Mapping[str, Any], factor: float, shift: float) -> dict[str, Any]:
    """Return (√f S + π⁻¹√λ I)⁻¹ and (√f A + π√λ I)⁻¹, whose Kronecker product approximates (f·K + λI)⁻¹.

    π balances the two by their mean eigenvalues.

    Args:
        block: State of a `KroneckerBlock`.
        factor: f.
        shift: λ.

    Returns:
        The block's place, and both inverses; of a diagonal factor its diagonal.
    """
    inner, outer = block["inner"], block["outer"]
    a, s = _mean_eigenvalue(inner, block["groups"]), _mean_eigenvalue(outer, block["groups"])
    tiny = torch.finfo(inner.dtype).eps
    pi = (a.clamp_min(tiny) / s.clamp_min(tiny)).sqrt()
    root = math.sqrt(factor)
    floor = tiny * root * torch.maximum(a, s)
    inner_inverse = _inverse(root * inner, pi * math.sqrt(shift) + floor, block["groups"])
    outer_inverse = _inverse(root * outer, math.sqrt(shift) / pi + floor, block["groups"])
    place = {name: block[name] for name in ("weight", "bias", "groups", "transposed")}
    return place | {"inner_inverse": inner_inverse, "outer_inverse": outer_inverse}


def _is_diagonal(factor: Tensor, groups: int) -> bool:
    return factor.ndim == (1 if groups == 1 else 2)


def _mean_eigenvalue(factor: Tensor, groups: int) -> Tensor:
    return factor.mean() if _is_diagonal(factor, groups) else factor.diagonal(dim1=-2, dim2=-1).mean()


def _inverse(factor: Tensor, shift: Tensor, groups: int) -> Tensor:
    if _is_diagonal(factor, groups):
        return 1 / (factor + shift)
    eye = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
    cholesky, failed = torch.linalg.cholesky_ex(factor + shift * eye)
    if not bool(failed.any()):
        return torch.cholesky_inverse(cholesky)
    values, vectors = eigh(factor)  # rounding made the factor indefinite by more than its damping
    least = values.amax(-1, keepdim=True) * torch.finfo(values.dtype).eps
    return (vectors / (values + torch.maximum(shift, least)).unsqueeze(-2)) @ vectors.mT


def _part_of(part: Mapping[str, Any], pieces: Sequence[Tensor]) -> Tensor:
    return pieces[part["index"]] if "index" in part else matrix_of(part, pieces)


def _solve(part: Mapping[str, Any], x: Tensor) -> Tensor:
    """Return K'⁻¹x; `x` may have leading dimensions."""
    if "index" in part:
        return x * part["inverse"]
    inner, outer = part["inner_inverse"], part["outer_inverse"]
    x = x * inner.unsqueeze(-2) if _is_diagonal(inner, part["groups"]) else x @ inner
    return x * outer.unsqueeze(-1) if _is_diagonal(outer, part["groups"]) else outer @ x


def _times(rows: Tensor, factor: Tensor) -> Tensor:
    return rows * factor if factor.ndim == 1 else rows @ factor


def _gram(parts: Sequence[Mapping[str, Any]]) -> Tensor:
    """Return I + U K'⁻¹ Uᵀ, of which the lower triangle counts."""
    some = parts[0]["s"] if "s" in parts[0] else parts[0]["rows"]
    gram = torch.eye(len(some), dtype=some.dtype, device=some.device)
    for part in parts:
        if "s" in part:
            s, a = part["s"], part["a"]
            add_gram(gram, _times(s, part["outer_inverse"]), s, (_times(a, part["inner_inverse"]), a))
        else:
            add_gram(gram, _solve(part, part["rows"]).flatten(1), part["rows"].flatten(1))
    return gram


def _energy(part: Mapping[str, Any]) -> float:
    """Return the squared Frobenius norm of one block's U."""
    if "s" in part:
        return float((part["s"].square().sum(1) * part["a"].square().sum(1)).sum())
    return float(part["rows"].square().sum())


def _project(part: Mapping[str, Any], x: Tensor) -> Tensor:
    """Return U x of one block."""
    if "s" in part:
        return ((part["s"] @ x) * part["a"]).sum(1)
    return part["rows"].flatten(1) @ x.reshape(-1)


def _combine(part: Mapping[str, Any], y: Tensor, shape: torch.Size) -> Tensor:
    """Return Uᵀy of one block."""
    if "s" in part:
        return (part["s"] * y.unsqueeze(1)).T @ part["a"]
    return (y @ part["rows"].flatten(1)).reshape(shape)
