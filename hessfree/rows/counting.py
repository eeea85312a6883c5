"""What the forms of a Gauss-Newton matrix take, counted from the shapes in the graph of the outputs."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from hessfree.rows.by_sample import products_of
from hessfree.rows.graph import OutputGraph
from hessfree.rows.reach import Uses


@dataclasses.dataclass(frozen=True)
class Counts:
    """Sizes that the cost of a product, of a Gram matrix and of a dense matrix follow from.

    Attributes:
        forward: Multiply-adds of one forward pass of all samples.
        activations: Numbers that its matrix products and convolutions give.
        operations: Nodes of the graph: kernels of a forward pass.
        layers: (in, out) of each weight that stands in one layer called once on plain samples.
        whole: Numbers in all other parameters, whose rows of J are formed.
        by_row: Whether some of these take a backward pass a row: they are no factor of a product.
    """

    forward: int
    activations: int
    operations: int
    layers: tuple[tuple[int, int], ...]
    whole: int
    by_row: bool


def counts_of(graph: OutputGraph, samples: int) -> Counts:
    """Read the shapes; nothing is computed.

    Args:
        graph: The outputs and the parameters.
        samples: N.

    Returns:
        The counts.
    """
    uses = Uses(graph.outputs)
    layers, whole, by_row = [], 0, False
    for p in graph.parameters.params:
        found = products_of(uses, p)
        by_row = by_row or found is None
        if found is None or len(found) > 1 or (found and _left_sizes(found[0].node)[0] != samples):
            whole += p.numel()
        elif found and found[0].turned is not None:
            rows, columns = p.shape
            layers.append((columns, rows) if found[0].turned else (rows, columns))
    products = [_product(node) for node in uses.nodes]
    forward, activations = (sum(numbers) for numbers in zip(*products, strict=True))
    return Counts(
        forward or samples * graph.parameters.size, activations, len(uses.nodes), tuple(layers), whole, by_row
    )


def _left_sizes(node: Any) -> tuple[int, ...]:
    return node._saved_mat1_sym_sizes if node.name() == "AddmmBackward0" else node._saved_self_sym_sizes


def _product(node: Any) -> tuple[int, int]:
    """Return the multiply-adds of a node, and the numbers that it gives; zeros where it is no product of matrices."""
    name = node.name()
    if name in {"AddmmBackward0", "MmBackward0"}:
        rows, inner = _left_sizes(node)
        columns = node._saved_mat2_sym_sizes[1]
        return rows * inner * columns, rows * columns
    if name == "BmmBackward0" and node._saved_self is not None and node._saved_mat2 is not None:
        left, columns = node._saved_self, node._saved_mat2.shape[2]
        return left.numel() * columns, left.shape[0] * left.shape[1] * columns
    if name == "ConvolutionBackward0" and node._saved_input is not None and node._saved_weight is not None:
        x, weight = node._saved_input, node._saved_weight
        sizes = x.shape[2:]
        if not node._saved_transposed:
            settings = zip(
                sizes, weight.shape[2:], node._saved_stride, node._saved_padding, node._saved_dilation, strict=True
            )
            sizes = [(size + 2 * pad - gap * (k - 1) - 1) // step + 1 for size, k, step, pad, gap in settings]
        places = x.shape[0] * math.prod(sizes)
        return places * weight.numel(), places * weight.shape[0]
    return 0, 0
