"""Rows of BᵀJ for a few samples, where H = B Bᵀ: by factors at Linear layers, as they are at other parameters."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hessfree.losses import Form, JoinedForm
from hessfree.preconditioners.base import Sample
from hessfree.preconditioners.cotangents import cotangents
from hessfree.preconditioners.kronecker import matrix_of
from hessfree.recording import Call
from hessfree.rows import Leading, sample_rows

MOST_COLUMNS = 4  # each output has a row of its own up to so many rows for each sample asked for
LARGE_PRIME = 2_147_483_647  # between the seeds of several draws, apart from those of other steps


def jacobian_rows(
    sample: Sample, count: int | None, blocks: Sequence[Mapping[str, Any]], diagonal: Mapping[int, Tensor]
) -> tuple[list[dict[str, Tensor]], bool]:
    """Return rows U such that UᵀU is the Gauss-Newton matrix of the first `count` samples, scaled to all of them.

    Outputs that differ in their number of samples (a residual inside a domain, and one on its boundary) share
    `count` in proportion, and each has its own rows.

    Args:
        sample: The network on the curvature batch.
        count: How many samples; None for all.
        blocks: K-FAC's blocks.
        diagonal: By number, the parameters in no block.

    Returns:
        For each block, then for each other parameter: `s` `[R, out]` and `a` `[R, in]`, whose outer products are the
        rows of a Linear layer called once on plain samples; or `rows`, `[R, ...]` shaped like the block's matrix.
        And whether UᵀU is all of G: every sample has a row for each of its outputs.
    """
    groups, exact = _leading(sample, count)
    calls = {number: call for number, block in enumerate(blocks) if (call := _plain_call(sample, block)) is not None}
    rest = [block for number, block in enumerate(blocks) if number not in calls]
    indices = sorted({i for b in rest for i in (b["weight"], b["bias"]) if i is not None} | set(diagonal))
    factored: dict[int, list[dict[str, Tensor]]] = {number: [] for number in calls}
    explicit: dict[int, list[Tensor]] = {i: [] for i in indices}
    for group in groups:
        scale = math.sqrt(sample.scale * group.samples / group.count)
        for number, found in zip(calls, _factored_rows(sample, calls, blocks, group, scale), strict=True):
            factored[number].append(found)
        for i, rows in (sample_rows(sample.graph, indices, group) if indices else {}).items():
            explicit[i].append(rows * scale)
    together = {i: torch.cat(rows) for i, rows in explicit.items()}
    out = []
    for number, block in enumerate(blocks):
        if number in calls:
            out.append({name: torch.cat([found[name] for found in factored[number]]) for name in ("s", "a")})
        else:
            out.append({"rows": _as_matrices(block, together)})
    complete = exact and all(group.count == group.samples for group in groups)
    return out + [{"rows": together[i]} for i in diagonal], complete


def _leading(sample: Sample, count: int | None) -> tuple[list[Leading], bool]:
    """Return the samples that have rows, and whether their rows are exact rather than of random signs."""
    space, form = sample.hessian.space, sample.hessian.form
    if all(shape and shape[0] == sample.samples for shape in space.shapes):
        asked = sample.samples if count is None else count
        count = min(asked, sample.samples)
        exact = form is not None and space.size // sample.samples * count <= MOST_COLUMNS * asked
        if exact:
            vectors, _ = cotangents(sample, "exact")
            columns = [_masked(sample, u, count) for u in vectors]
        else:  # fewer samples than were asked for have several rows of random signs each
            draws = max(1, asked // count)
            several = [dataclasses.replace(sample, seed=sample.seed + k * LARGE_PRIME) for k in range(draws)]
            vectors = (u for s in several for u in cotangents(s, "sampled")[0])
            columns = [_masked(sample, u, count) / math.sqrt(draws) for u in vectors]
        return [Leading(tuple(range(len(space.shapes))), sample.samples, count, columns)], exact
    # outputs that share no batch dimension: H couples no two of them, or has no structure
    sizes = [shape[0] if shape else 1 for shape in space.shapes]
    share = 1.0 if count is None else min(1.0, count / max(sum(sizes), 1))
    groups, exact = [], form is not None
    for k, (size, numel) in enumerate(zip(sizes, space.numels, strict=True)):
        if numel == 0:
            continue
        width = numel // size
        if form is not None and width <= MOST_COLUMNS:
            whole = [u.reshape(size, width) for u in _columns_of(form, sample, k)]
        else:
            exact = False
            drawn, _ = cotangents(sample, "sampled")
            known = form is not None or bool(sample.batches)  # else each output is taken for a mean of its own
            weight = 1.0 if known else math.sqrt(size / sample.samples)
            whole = [space.views(u)[k].reshape(size, width) * weight for u in drawn]
        taken = max(1, math.ceil(share * size))
        columns = []
        for piece in whole:
            u = torch.zeros(space.size, dtype=space.dtype, device=space.device)
            space.views(u)[k].reshape(size, width)[:taken] = piece[:taken]
            columns.append(u)
        groups.append(Leading((k,), size, taken, columns))
    return groups, exact


def _columns_of(form: Form, sample: Sample, output: int) -> Iterator[Tensor]:
    """Yield the columns of one output's root, where H couples no two outputs: `form` is diagonal, or joined."""
    if isinstance(form, JoinedForm):
        yield from form.columns_of(output)
        return
    space = sample.hessian.space
    shape = space.shapes[output]
    root = form.root(torch.ones(space.size, dtype=space.dtype, device=space.device))
    matrix = space.views(root)[output].reshape(shape[0] if shape else 1, -1)
    for column in range(matrix.shape[1]):
        out = torch.zeros_like(matrix)
        out[:, column] = matrix[:, column]
        yield out


def _masked(sample: Sample, u: Tensor, count: int) -> Tensor:
    kept = [t.clone() for t in sample.hessian.space.views(u)]
    for t in kept:
        t[count:] = 0
    return sample.hessian.space.flatten(kept)


def _factored_rows(
    sample: Sample, calls: Mapping[int, Call], blocks: Sequence[Mapping[str, Any]], group: Leading, scale: float
) -> Iterator[dict[str, Tensor]]:
    """Yield s and a of the group's samples for each of `calls`."""
    if not calls:
        return
    edges = [call.outputs[0].edge for call in calls.values()]
    pulled = [sample.graph.pull_back(edges, u, group.outputs) for u in group.columns]
    dtype, count = sample.parameters.dtype, group.count
    for k, (number, call) in enumerate(calls.items()):
        width = call.outputs[0].shape[1]
        a = (call.inputs[0] if call.inputs else call.keywords["input"]).detach()[:count].to(dtype)
        s = torch.cat([a.new_zeros(count, width) if (g := p[k]) is None else g[:count].to(dtype) for p in pulled])
        if blocks[number]["bias"] is not None:
            a = torch.cat([a, a.new_ones(count, 1)], 1)
        yield {"s": s * scale, "a": a.repeat(len(pulled), 1)}


def _plain_call(sample: Sample, block: Mapping[str, Any]) -> Call | None:
    """Return the only call of the block's Linear layer, if its rows are the samples of every output."""
    weight = sample.parameters.params[block["weight"]]
    calls = [c for root in sample.calls for c in root.walk() if getattr(c.module, "weight", None) is weight]
    if len(calls) != 1 or not isinstance(calls[0].module, nn.Linear):
        return None
    if not all(shape and shape[0] == sample.samples for shape in sample.hessian.space.shapes):
        return None
    shape = calls[0].outputs[0].shape if calls[0].outputs else torch.Size()
    return calls[0] if len(shape) == 2 and shape[0] == sample.samples else None


def _as_matrices(block: Mapping[str, Any], rows: Mapping[int, Tensor]) -> Tensor:
    """Return the rows of a block's weight and bias as its matrices."""
    own = {i: rows[i] for i in (block["weight"], block["bias"]) if i is not None}
    return torch.func.vmap(lambda *pieces: matrix_of(block, dict(zip(own, pieces, strict=True))))(*own.values())
