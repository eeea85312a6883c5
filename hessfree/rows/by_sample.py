"""A row of uᵀJ for each of many samples, from one backward pass where the graph allows it.

In the graph a matrix W is a factor of products C = A Wᵀ (a layer's call) and C = A W (the backward pass of a layer,
where the loss holds a derivative in the input). If the rows of A and C are the samples, or positions of them, sample
n's gradient of W is the sum over all products, and over its own rows, of an outer product of a row of A and a row of
the gradient at C. One backward pass thus gives the gradients of all samples.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Generator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge

from hessfree.precision import unit
from hessfree.rows.graph import OutputGraph
from hessfree.rows.reach import Uses

CHUNK = 64  # rows of one batched backward pass: its memory is that of so many passes


@dataclasses.dataclass(frozen=True, eq=False)
class Leading:
    """The first samples of some outputs, and cotangents for them.

    Attributes:
        outputs: The numbers of the outputs, all of N samples.
        samples: N, the number of samples of these outputs.
        count: How many of them have rows.
        columns: Vectors u `[Z]`, zero at all other outputs and samples. Each gives one row a sample.
    """

    outputs: tuple[int, ...]
    samples: int
    count: int
    columns: list[Tensor]


def sample_rows(graph: OutputGraph, indices: Sequence[int], leading: Leading) -> dict[int, Tensor]:
    """Return uᵀJ restricted to each of the leading samples, for every column u.

    Args:
        graph: The outputs and the parameters.
        indices: Numbers of the parameters.
        leading: The samples.

    Returns:
        By number of the parameter, `[columns · count, *shape]`, a column's samples together.
    """
    uses = Uses(graph.outputs)
    products = {i: products_of(uses, graph.parameters.params[i]) for i in indices}
    matrices = {i: found for i, found in products.items() if found is not None}
    rows = _rows_by_products(graph, matrices, leading) if matrices else {}
    rest = [i for i in indices if i not in rows]
    return rows | (_rows_one_by_one(graph, rest, leading) if rest else {})


class Product(NamedTuple):
    """A product that a parameter is a factor of; or a bias that is added to one (`turned` is None)."""

    node: Node
    turned: bool | None  # whether it is A Wᵀ rather than A W


def products_of(uses: Uses, parameter: Tensor) -> list[Product] | None:
    """Return all products that `parameter` goes into; None where it is used in another way as well."""
    found: list[Product] = []
    stack = [(get_gradient_edge(parameter).node, False)]
    while stack:
        node, turned = stack.pop()
        for use in uses.of(node):
            name = use.node.name()
            if name == "TBackward0":
                stack.append((use.node, not turned))
            elif name == "ToCopyBackward0":
                stack.append((use.node, turned))
            elif name == "MmBackward0" and use.argument == 1 and parameter.ndim == 2:
                found.append(Product(use.node, turned))
            elif name == "AddmmBackward0" and _plain(use.node) and use.argument == 2 and parameter.ndim == 2:
                found.append(Product(use.node, turned))
            elif name == "AddmmBackward0" and _plain(use.node) and use.argument == 0 and parameter.ndim == 1:
                found.append(Product(use.node, None))
            else:
                return None
    return found


def _plain(node: Any) -> bool:
    return node._saved_alpha == 1 and node._saved_beta == 1


def left_factor(node: Any) -> Tensor:
    """Return A of the product A Wᵀ or A W that `node` stands for, `[rows, in]`."""
    factor = node._saved_mat1 if node.name() == "AddmmBackward0" else node._saved_self
    return factor.detach()


@contextlib.contextmanager
def captured(nodes: Sequence[Node]) -> Generator[dict[Node, Tensor]]:
    """Keep the gradients that arrive at `nodes`.

    Args:
        nodes: Nodes of the graph with one output.

    Yields:
        By node, the gradient at its output; filled by a backward pass, without nodes that it does not meet.
    """
    found: dict[Node, Tensor] = {}

    def keep(node: Node) -> Any:
        def hook(gradients: tuple[Tensor | None, ...]) -> None:
            if gradients[0] is not None:
                found[node] = gradients[0].detach()

        return hook

    handles = [node.register_prehook(keep(node)) for node in dict.fromkeys(nodes)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _rows_by_products(graph: OutputGraph, products: dict[int, list[Product]], leading: Leading) -> dict[int, Tensor]:
    """Return the rows of all parameters whose products keep samples apart."""
    parameters = graph.parameters
    params = [parameters.params[i] for i in products]
    with captured([p.node for found in products.values() for p in found]) as gradients:
        owners = owners_of(graph, params, leading, gradients)
        kept = {i: found for i, found in products.items() if all(owners.get(p.node, ()) is not None for p in found)}
        shapes = {i: (leading.count, *parameters.shapes[i]) for i in kept}
        rows: dict[int, list[Tensor]] = {i: [] for i in kept}
        for u in leading.columns:
            gradients.clear()
            graph.pull_back(params, u, leading.outputs)
            for i, found in kept.items():
                total = torch.zeros(shapes[i], dtype=parameters.dtype, device=parameters.device)
                for product in found:
                    if product.node in gradients:
                        _add_rows(total, product, gradients[product.node], owners[product.node], leading)
                rows[i].append(total)
    return {i: torch.cat(t) for i, t in rows.items()}


def _add_rows(total: Tensor, product: Product, gradient: Tensor, owner: Tensor | None, leading: Leading) -> None:
    """Add what one product gives to every sample's gradient."""
    assert owner is not None
    g = gradient.to(total.dtype)
    factor = None if product.turned is None else left_factor(product.node).to(total.dtype)
    if not owner.numel():  # in the order of the samples, as many rows each
        g = g.reshape(leading.samples, -1, g.shape[-1])[: leading.count]
        if factor is None:
            total += g.sum(1)
            return
        factor = factor.reshape(leading.samples, -1, factor.shape[-1])[: leading.count]
        total.baddbmm_(*((g.mT, factor) if product.turned else (factor.mT, g)))
        return
    mine = owner < leading.count
    g, owner = g[mine], owner[mine]
    if factor is not None:
        s, a = (g, factor[mine]) if product.turned else (factor[mine], g)
        if len(owner) and bool((owner.diff() == 1).all()):  # the rows of one of several batches that were joined
            total[int(owner[0]) : int(owner[-1]) + 1].baddbmm_(s.unsqueeze(2), a.unsqueeze(1))
            return
        g = s.unsqueeze(2) * a.unsqueeze(1)
    total.index_add_(0, owner, g)


def owners_of(
    graph: OutputGraph, params: Sequence[Tensor], leading: Leading, gradients: dict[Node, Tensor]
) -> dict[Node, Tensor | None]:
    """Find out which sample each row of each product belongs to.

    A row belongs to the only sample whose cotangent makes its gradient nonzero. If rows stand in the order of the
    samples, weights on the samples come out as weights on the rows: two backward passes tell. Where they do not
    (several batches that were joined), two passes for each bit of a sample's number tell its bits.

    Args:
        graph: The outputs and the parameters.
        params: The parameters.
        leading: The samples.
        gradients: Filled by a backward pass with the gradients at the products.

    Returns:
        By node, the samples' numbers `[rows]`; an empty tensor for rows in the order of the samples, as many each;
        None where some row belongs to several samples.
    """
    numbers = torch.arange(leading.samples, device=leading.columns[0].device)

    def pulled(weights: Tensor) -> dict[Node, Tensor]:
        gradients.clear()
        graph.pull_back(params, _of_samples(graph, weights, leading), leading.outputs)
        return dict(gradients)

    def hits(mask: Tensor) -> dict[Node, Tensor]:
        return {node: (g != 0).any(1) if g.ndim == 2 else g.new_ones(0) for node, g in pulled(mask).items()}

    owners: dict[Node, Tensor | None] = {}
    unclear: dict[Node, Tensor] = {}
    weights = torch.rand(leading.samples, generator=graph.generator(), device=numbers.device) + 0.5
    weighted = pulled(weights)
    for node, g in pulled(torch.ones_like(weights)).items():
        if _in_order(g, weighted[node], weights):
            owners[node] = numbers[:0]
        else:
            unclear[node] = torch.zeros(len(g) if g.ndim == 2 else 0, dtype=torch.int64, device=g.device)
    mixed = {node for node, found in unclear.items() if not found.numel()}
    for bit in range((leading.samples - 1).bit_length() if unclear else 0):
        ones = hits((numbers >> bit) % 2 == 1)
        zeros = hits((numbers >> bit) % 2 == 0)
        for node, found in unclear.items():
            if node in ones and node in zeros and found.numel():
                found += ones[node].to(found.dtype) << bit
                if bool((ones[node] & zeros[node]).any()):
                    mixed.add(node)
    return owners | {node: None if node in mixed else found for node, found in unclear.items()}


def _in_order(gradient: Tensor, weighted: Tensor, weights: Tensor) -> bool:
    """Tell whether the rows are those of the samples, in their order and as many each."""
    if gradient.ndim != 2 or len(gradient) % len(weights):
        return False
    expected = gradient.reshape(len(weights), -1) * weights.to(gradient.dtype).unsqueeze(1)
    error = (weighted.reshape(len(weights), -1) - expected).norm()
    return bool(error <= unit(gradient.dtype, gradient.device) ** 0.5 * expected.norm())


def _of_samples(graph: OutputGraph, weights: Tensor, leading: Leading) -> Tensor:
    """Return a number a sample times what is random: equal outputs are what a softmax or a normalisation cancels."""
    space = graph.space
    u = torch.zeros(space.size, dtype=space.dtype, device=space.device)
    generator = graph.generator()
    for k in leading.outputs:
        piece = space.views(u)[k].view(leading.samples, -1)
        piece.copy_(torch.rand(piece.shape, generator=generator, dtype=u.dtype, device=u.device) + 0.5)
        piece.mul_(weights.to(u.dtype).unsqueeze(1))
    return u


def _rows_one_by_one(graph: OutputGraph, indices: Sequence[int], leading: Leading) -> dict[int, Tensor]:
    """Return the rows by a backward pass a row, many at once where every operation has a batching rule."""
    parameters, space = graph.parameters, graph.space
    params = [parameters.params[i] for i in indices]
    found: list[list[Tensor]] = [[] for _ in indices]
    batched = True
    for u in leading.columns:
        for start in range(0, leading.count, CHUNK):
            numbers = torch.arange(start, min(start + CHUNK, leading.count), device=u.device)
            rows = u.new_zeros(len(numbers), space.size)
            for k in leading.outputs:
                width, offset = space.numels[k] // leading.samples, sum(space.numels[:k])
                places = offset + numbers[:, None] * width + torch.arange(width, device=u.device)
                rows.scatter_(1, places, space.views(u)[k].reshape(leading.samples, width)[numbers])
            if batched:
                try:
                    pulled = graph.pull_back(params, rows, leading.outputs, batched=True)
                except RuntimeError:  # an operation without a batching rule: one row at a time always works
                    batched = False
            if not batched:
                single = [graph.pull_back(params, row, leading.outputs) for row in rows]
                pulled = [None if c[0] is None else torch.stack(c) for c in zip(*single, strict=True)]
            for known, p, t in zip(found, params, pulled, strict=True):
                known.append(p.new_zeros(len(numbers), *p.shape) if t is None else t.detach())
    return {i: torch.cat(t).to(parameters.dtype) for i, t in zip(indices, found, strict=True)}
