"""Rows of BᵀJ for a few samples, where H = B Bᵀ: by factors at Linear layers, as they are at other parameters."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hessfree.preconditioners.base import Sample
from hessfree.preconditioners.cotangents import cotangents
from hessfree.preconditioners.kronecker import matrix_of
from hessfree.recording import Call

MOST_COLUMNS = 4  # outputs a sample up to which each has a row of its own


def jacobian_rows(
    sample: Sample, count: int, blocks: Sequence[Mapping[str, Any]], diagonal: Mapping[int, Tensor]
) -> list[dict[str, Tensor]]:
    """Return rows U such that UᵀU is the Gauss-Newton matrix of the first `count` samples, scaled to all of them.

    Args:
        sample: The network on the curvature batch.
        count: How many samples.
        blocks: K-FAC's blocks.
        diagonal: By number, the parameters in no block.

    Returns:
        For each block, then for each other parameter: `s` `[R, out]` and `a` `[R, in]`, whose outer products are the
        rows of a Linear layer called once on plain samples; or `rows`, `[R, ...]` shaped like the block's matrix.
    """
    count = min(count, sample.samples)
    drawn, columns = _leading_cotangents(sample, count)
    scale = math.sqrt(sample.scale * sample.samples / count)
    by_factors = {}
    for number, block in enumerate(blocks):
        call = _plain_call(sample, block)
        if call is not None:
            by_factors[number] = call
    edges = [call.outputs[0].edge for call in by_factors.values()]
    pulled = [_grad(sample, edges, u) for u in columns] if edges else [[] for _ in columns]
    found: dict[int, dict[str, Tensor]] = {}
    for k, (number, call) in enumerate(by_factors.items()):
        width = call.outputs[0].shape[1]
        s = torch.cat([drawn.new_zeros(count, width) if (g := p[k]) is None else g[:count] for p in pulled])
        a = (call.inputs[0] if call.inputs else call.keywords["input"]).detach()[:count].to(sample.parameters.dtype)
        if blocks[number]["bias"] is not None:
            a = torch.cat([a, a.new_ones(count, 1)], 1)
        found[number] = {"s": s.to(a.dtype) * scale, "a": a.repeat(len(columns), 1)}
    rest = [b for number, b in enumerate(blocks) if number not in found]
    explicit = _explicit_rows(sample, drawn * scale, rest, list(diagonal)) if rest or diagonal else []
    others = iter(explicit)
    return [found[i] if i in found else next(others) for i in range(len(blocks))] + list(others)


def _leading_cotangents(sample: Sample, count: int) -> tuple[Tensor, list[Tensor]]:
    """Return one cotangent a row `[R, Z]` (lazily small), and the same summed over samples, one a column."""
    space = sample.hessian.space
    exact = space.size <= MOST_COLUMNS * sample.samples and sample.hessian.form is not None
    vectors, _ = cotangents(sample, "exact" if exact else "sampled")
    columns = []
    for u in vectors:
        kept = [t.clone() for t in space.views(u)]
        for t in kept:
            t[count:] = 0
        columns.append(space.flatten(kept))
    rows = []
    for u in columns:
        single = [u.new_zeros(count, *shape) for shape in space.shapes]
        for t, piece in zip(single, space.views(u), strict=True):
            index = torch.arange(count, device=t.device)
            t[index, index] = piece[:count]
        rows.append(torch.cat([t.flatten(1) for t in single], 1))
    return torch.cat(rows), columns


def _plain_call(sample: Sample, block: Mapping[str, Any]) -> Call | None:
    """Return the only call of the block's Linear layer, if its rows are the samples."""
    weight = sample.parameters.params[block["weight"]]
    calls = [c for root in sample.calls for c in root.walk() if getattr(c.module, "weight", None) is weight]
    if len(calls) != 1 or not isinstance(calls[0].module, nn.Linear):
        return None
    shape = calls[0].outputs[0].shape if calls[0].outputs else torch.Size()
    return calls[0] if len(shape) == 2 and shape[0] == sample.samples else None


def _grad(sample: Sample, inputs: Sequence[Any], u: Tensor, batched: bool = False) -> list[Tensor | None]:
    space = sample.hessian.space
    pieces = [
        t.reshape(*u.shape[:-1], *shape) for t, shape in zip(u.split(space.numels, -1), space.shapes, strict=True)
    ]
    edges = [o.edge for o in sample.outputs]
    weights = [t.to(dtype) for t, dtype in zip(pieces, space.dtypes, strict=True)]
    return list(
        torch.autograd.grad(
            edges, inputs, weights, retain_graph=True, allow_unused=True, is_grads_batched=batched
        )
    )


def _explicit_rows(
    sample: Sample, drawn: Tensor, blocks: Sequence[Mapping[str, Any]], others: Sequence[int]
) -> list[dict[str, Tensor]]:
    parameters = sample.parameters
    needed = {i for b in blocks for i in (b["weight"], b["bias"]) if i is not None} | set(others)
    indices = sorted(needed)
    params = [parameters.params[i] for i in indices]
    try:
        found = _grad(sample, params, drawn, batched=True)
    except RuntimeError:  # an operation without a batching rule: one row at a time always works
        single = [_grad(sample, params, u) for u in drawn]
        found = [None if column[0] is None else torch.stack(column) for column in zip(*single, strict=True)]
    rows = {
        i: p.new_zeros(len(drawn), *p.shape).to(parameters.dtype) if t is None else t.to(parameters.dtype)
        for i, p, t in zip(indices, params, found, strict=True)
    }
    out = []
    for block in blocks:
        pieces = [{i: r[k] for i, r in rows.items()} for k in range(len(drawn))]
        out.append({"rows": torch.stack([matrix_of(block, piece) for piece in pieces])})
    return out + [{"rows": rows[i]} for i in others]
