"""How each kind of layer looks to K-FAC: its weight as matrices, its inputs and output gradients as rows.

For a weight seen as G matrices `[G, out, in]`, a layer gives rows a `[G, R, in]` of its input and s `[G, R, out]` of
the gradient at its output, such that the gradient of the weight is Σ_r s_r a_rᵀ. Positions (tokens, pixels) and
repeated calls are rows of their own ("expand", Eschenhagen et al. 2023).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Rows(NamedTuple):
    """What one call says of one block.

    Attributes:
        inner: a, `[G, R, in]`; or, for one-hot rows, their frequencies `[1, in]` with `one_hot` set.
        outer: From the gradient at the output to s, `[G, R, out]`.
        one_hot: Whether A is diagonal, and `inner` its diagonal.
    """

    inner: Tensor
    outer: Callable[[Tensor], Tensor]
    one_hot: bool = False


@dataclasses.dataclass(frozen=True)
class Part:
    """One block of a layer's parameters.

    Attributes:
        weight: The parameter.
        bias: A parameter that joins the block as one more column of the input; or None.
        groups: G.
        transposed: Whether the weight is stored as `[in, out]`.
        rows: From the call's input to its rows.
    """

    weight: Tensor
    bias: Tensor | None
    groups: int
    transposed: bool
    rows: Callable[[Tensor], Rows]


LARGEST_NORM = 1024  # a normalisation layer of more channels gets a diagonal: its block is dense


def parts_of(module: nn.Module) -> list[Part]:
    """Return how K-FAC sees `module`.

    Args:
        module: Any module.

    Returns:
        Its blocks; none where it is not one of Linear, Conv1d to Conv3d, Embedding, LayerNorm, GroupNorm and
        BatchNorm1d to BatchNorm3d.
    """
    if isinstance(module, nn.Linear):
        return [Part(module.weight, module.bias, 1, False, _linear_rows)]
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return [Part(module.weight, module.bias, module.groups, False, lambda x: _convolution_rows(module, x))]
    if isinstance(module, nn.Embedding):
        if module.max_norm is not None or module.scale_grad_by_freq:
            return []
        return [Part(module.weight, None, 1, True, lambda x: _embedding_rows(module, x))]
    if isinstance(module, nn.LayerNorm | nn.GroupNorm | nn.modules.batchnorm._BatchNorm):
        return _norm_parts(module)
    return []


LAYERS: tuple[type[nn.Module], ...] = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.Embedding,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.modules.batchnorm._BatchNorm,
)


def _linear_rows(x: Tensor) -> Rows:
    return Rows(x.reshape(1, -1, x.shape[-1]), lambda g: g.reshape(1, -1, g.shape[-1]))


def _convolution_rows(module: nn.Conv1d | nn.Conv2d | nn.Conv3d, x: Tensor) -> Rows:
    """Cut the input into the patches that each output position sees, in the order of the weight's entries."""
    spatial = len(module.kernel_size)
    if x.ndim == spatial + 1:
        x = x.unsqueeze(0)
    padding = module._reversed_padding_repeated_twice
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    x = F.pad(x, padding, mode=mode)
    for i, (size, stride, dilation) in enumerate(
        zip(module.kernel_size, module.stride, module.dilation, strict=True), start=2
    ):
        x = x.unfold(i, dilation * (size - 1) + 1, stride)[..., ::dilation]
    # [N, C, positions..., kernel...] -> [groups, N * positions, C / groups * kernel]
    n, channels = x.shape[:2]
    groups = module.groups
    x = x.reshape(n, groups, channels // groups, *x.shape[2:])
    order = [1, 0, *range(3, 3 + spatial), 2, *range(3 + spatial, 3 + 2 * spatial)]
    inner = x.permute(order).reshape(groups, -1, module.weight[0].numel())

    def outer(g: Tensor) -> Tensor:
        g = g if g.ndim == spatial + 2 else g.unsqueeze(0)
        g = g.reshape(g.shape[0], groups, module.out_channels // groups, -1)
        return g.permute(1, 0, 3, 2).reshape(groups, -1, module.out_channels // groups)

    return Rows(inner, outer)


def _embedding_rows(module: nn.Embedding, x: Tensor) -> Rows:
    counts = torch.bincount(x.reshape(-1), minlength=module.num_embeddings).to(module.weight.dtype)
    if module.padding_idx is not None:
        counts[module.padding_idx] = 0
    return Rows((counts / max(x.numel(), 1)).unsqueeze(0), lambda g: g.reshape(1, -1, g.shape[-1]), one_hot=True)


def _norm_parts(module: nn.Module) -> list[Part]:
    """Return scale and shift as one-column weights, whose S is their exact block summed over samples."""
    parts = []
    for name in ("weight", "bias"):
        p = getattr(module, name)
        if p is not None and p.numel() <= LARGEST_NORM:
            parts.append(Part(p, None, 1, False, functools.partial(_norm_rows, module, name == "weight")))
    return parts


def _norm_rows(module: nn.Module, scale: bool, x: Tensor) -> Rows:
    normal = _normalised(module, x) if scale else None

    def outer(g: Tensor) -> Tensor:
        g = g if normal is None else g * normal.to(g.dtype)
        if isinstance(module, nn.LayerNorm):
            # one row a sample: positions of a sample add up in the same gradient
            features = math.prod(module.normalized_shape)
            samples = g.shape[0] if g.ndim > len(module.normalized_shape) else 1
            g = g.reshape(samples, -1, features).sum(1)
        else:
            g = g.flatten(2).sum(2) if g.ndim > 2 else g
        return g.unsqueeze(0)

    return Rows(x.new_ones(1, 1, 1), outer)


def _normalised(module: nn.Module, x: Tensor) -> Tensor:
    """Return what the layer's scale multiplies."""
    if isinstance(module, nn.LayerNorm):
        return F.layer_norm(x, module.normalized_shape, None, None, module.eps)
    if isinstance(module, nn.GroupNorm):
        return F.group_norm(x, module.num_groups, None, None, module.eps)
    assert isinstance(module, nn.modules.batchnorm._BatchNorm)
    batch = module.training or module.running_mean is None
    mean, variance = (None, None) if batch else (module.running_mean, module.running_var)
    return F.batch_norm(x, mean, variance, None, None, batch, 0.0, module.eps)
