"""Rows of BᵀJ for all samples: their two factors where a layer is called once on plain samples, else whole."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import Node

from hessfree.rows.by_sample import Leading, Product, captured, left_factor, owners_of, products_of, sample_rows
from hessfree.rows.graph import OutputGraph
from hessfree.rows.reach import Uses


@dataclasses.dataclass(frozen=True, eq=False)
class Factors:
    """Rows at one product A Wᵀ (or A W) plus bias: row (c, n) is s_cn a_nᵀ for W (or a_n s_cnᵀ), and s_cn for the bias.

    Attributes:
        s: Gradients at the product, `[C·N, out]`, a column's samples together.
        a: A, `[N, in]`.
        weight: Number of W among the parameters; None if it is none of them.
        bias: Number of the bias; None likewise.
        turned: Whether the product is A Wᵀ.
    """

    s: Tensor
    a: Tensor
    weight: int | None
    bias: int | None
    turned: bool

    def to(self, dtype: torch.dtype) -> Factors:
        """Return the factors in another precision."""
        return dataclasses.replace(self, s=self.s.to(dtype), a=self.a.to(dtype))


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
    """U `[C·N, P]` by parts; parameters that stand in none have zeros.

    Attributes:
        factors: At Linear layers.
        whole: By number of any other parameter, `[C·N, numel]`.
    """

    factors: list[Factors]
    whole: dict[int, Tensor]

    def to(self, dtype: torch.dtype) -> Rows:
        """Return the rows in another precision."""
        return Rows([f.to(dtype) for f in self.factors], {i: t.to(dtype) for i, t in self.whole.items()})


def factored_rows(graph: OutputGraph, leading: Leading, most: int, factor: bool = True) -> Rows | None:
    """Return all rows uᵀJ of all samples, for every column u.

    Args:
        graph: The outputs and the parameters.
        leading: All of the samples.
        most: Numbers that may be held.
        factor: Whether to leave layers in factors; else every row is whole.

    Returns:
        The rows; None where they are more numbers than `most`.
    """
    params, numels = graph.parameters.params, graph.parameters.numels
    uses = Uses(graph.outputs)
    products = {i: products_of(uses, p) for i, p in enumerate(params)}
    used = [i for i, found in products.items() if found is None or found]
    single = {i: found[0] for i in used if factor and (found := products[i]) is not None and len(found) == 1}
    count = len(leading.columns) * leading.count
    if count * sum(numels[i] for i in used if i not in single) > most:
        return None
    factors = _factors(graph, single, leading) if single else []
    done = {i for f in factors for i in (f.weight, f.bias)}
    rest = [i for i in used if i not in done]
    held = count * sum(numels[i] for i in rest) + sum(f.s.numel() + f.a.numel() for f in factors)
    if held > most:
        return None
    whole = sample_rows(graph, rest, leading) if rest else {}
    return Rows(factors, {i: t.flatten(1) for i, t in whole.items()})


def _factors(graph: OutputGraph, products: dict[int, Product], leading: Leading) -> list[Factors]:
    """Return the factors at products whose rows are the samples, each once and in their order."""
    params, dtype = [graph.parameters.params[i] for i in products], graph.parameters.dtype
    by_node: dict[Node, dict[bool | None, int]] = {}
    for i, product in products.items():
        by_node.setdefault(product.node, {})[product.turned] = i
    with captured(list(by_node)) as gradients:
        owners = owners_of(graph, params, leading, gradients)
        plain = [
            node
            for node in by_node
            if (owner := owners.get(node)) is not None
            and not owner.numel()
            and len(gradients.get(node, ())) == leading.samples
        ]
        columns: dict[Node, list[Tensor]] = {node: [] for node in plain}
        for u in leading.columns if plain else ():
            gradients.clear()
            graph.pull_back(params, u, leading.outputs)
            for node, found in columns.items():
                found.append(gradients[node].to(dtype))
    return [_of_node(node, by_node[node], columns[node]) for node in plain]


def _of_node(node: Node, numbers: dict[bool | None, int], columns: Sequence[Tensor]) -> Factors:
    s = torch.cat(list(columns))
    weight = numbers.get(True, numbers.get(False))
    a = s.new_zeros(len(columns[0]), 0) if weight is None else left_factor(node).to(s.dtype)
    return Factors(s, a, weight, numbers.get(None), turned=False not in numbers)
