"""Functions that call an operator with less overhead than its own object."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from hessfree.linearization.traced.nodes import A


def _threshold_backward(g: Tensor, z: Tensor, threshold: float, *, out: Tensor | None = None) -> Tensor:
    if out is None:
        return A.threshold_backward.default(g, z, threshold)
    return A.threshold_backward.grad_input(g, z, threshold, grad_input=out)


# those with a kernel that writes straight into `out`
INTO: dict[Any, Callable[..., Tensor]] = {
    A.mm.default: torch.mm,
    A.addmm.default: torch.addmm,
    A.bmm.default: torch.bmm,
    A.baddbmm.default: torch.baddbmm,
    A.mul.Tensor: torch.mul,
    A.mul.Scalar: torch.mul,
    A.add.Tensor: torch.add,
    A.add.Scalar: torch.add,
    A.sub.Tensor: torch.sub,
    A.sub.Scalar: torch.sub,
    A.div.Tensor: torch.div,
    A.div.Scalar: torch.div,
    A.neg.default: torch.neg,
    A.sum.dim_IntList: torch.sum,
    A.mean.dim: torch.mean,
    A.threshold_backward.default: _threshold_backward,
}
DIRECT: dict[Any, Callable[..., Tensor]] = INTO | {
    A.t.default: torch.t,
    A.transpose.int: torch.transpose,
    A.permute.default: torch.permute,
    A.reshape.default: torch.reshape,
    A.exp.default: torch.exp,
    A.relu.default: torch.relu,
    A.tanh.default: torch.tanh,
    A.sigmoid.default: torch.sigmoid,
    A.clamp_max.default: torch.clamp_max,
}


def bind_directly(graph: fx.Graph) -> None:
    """Call the same kernels by functions with less overhead; nothing may look at the operators afterwards."""
    for node in graph.nodes:
        node.target = DIRECT.get(node.target, node.target)
