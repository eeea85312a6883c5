"""Let random numbers fall where the network let them fall."""

from __future__ import annotations

from torch import fx

from hessfree.linearization.traced.nodes import A, first, replace


def lay_out_draws(graph: fx.Graph) -> None:
    """Draw dropout masks in the order of the memory that they were drawn into.

    `x.bernoulli_(p)` fills x in the order of its memory, and its functional form a new row-major tensor: for a
    transposed x (attention with the batch second, images with channels last) the same stream of random numbers
    gives another mask. Here the numbers are drawn row-major and then permuted. (Other distributions are left as
    they are, for the comparison of outputs to refuse.)

    Args:
        graph: A functional graph, as recorded.
    """
    for node in list(graph.nodes):
        if node.target is not A.bernoulli.p:
            continue
        value = first(node).meta["val"]
        axes = sorted(range(value.ndim), key=value.stride, reverse=True)
        ordered = value.permute(axes)
        if value.is_contiguous() or not ordered.is_contiguous():
            continue
        with graph.inserting_before(node):
            options = {"dtype": value.dtype, "device": value.device}
            empty = graph.call_function(A.empty.memory_format, (list(ordered.shape),), options)
            drawn = graph.call_function(A.bernoulli.p, (empty, *node.args[1:]), node.kwargs)
            back = [axes.index(i) for i in range(value.ndim)]
            placed = graph.call_function(A.permute.default, (drawn, back))
        empty.meta, drawn.meta, placed.meta = {"val": ordered}, {"val": ordered}, dict(node.meta)
        replace(node, placed)
