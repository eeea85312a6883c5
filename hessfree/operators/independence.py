"""Do the samples of a batch have gradients of their own? Asked of the network and of the loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from hessfree.linearization import Evaluation, batch_size, single_root
from hessfree.losses import OutputHessian
from hessfree.recording import Cut, Trace
from hessfree.vectors import ParameterVector


def check_independent(recorded: Trace, cut: Cut, hessian: OutputHessian, parameters: ParameterVector) -> None:
    """Raise unless the loss is a sum over samples, of which each depends on its own input alone.

    The network is run twice more, with half of the inputs replaced, and the same random numbers: the outputs of the
    other half must stay. The Hessian of the loss is multiplied by a vector that is zero in one half.

    Args:
        recorded: A run of the network and its loss.
        cut: Its cut.
        hessian: Of the loss in z.
        parameters: The parameters.

    Raises:
        ValueError: It is not so, with the modules that mix samples by name, or it can't be found out.
    """
    count = batch_size(cut.outputs)
    root, reason = single_root(recorded.roots, cut.calls)
    if count == 0:
        reason = f"the outputs of shapes {[tuple(o.shape) for o in cut.outputs]} share no dimension 0 for samples"
    elif root is not None:
        inputs = [t for t in tree_leaves((root.inputs, root.keywords)) if isinstance(t, Tensor)]
        if not any(t.ndim and t.shape[0] == count for t in inputs):
            shapes = [tuple(t.shape) for t in inputs]
            reason = f"there are {count} samples along dimension 0 of the outputs, but the inputs have shapes {shapes}"
    if reason:
        raise ValueError(f"EmpiricalFisher needs the gradient of every sample, but {reason}; use MonteCarloFisher")
    assert root is not None
    if count == 1 or not Evaluation(recorded, cut.outputs, cut.calls, parameters).finite():
        return  # numbers that are not finite tell nothing
    half = (count + 1) // 2
    for kept in (slice(0, half), slice(half, count)):
        if _Disturbed(recorded, cut.outputs, cut.calls, parameters, kept).network is None:
            raise ValueError(
                f"EmpiricalFisher needs the gradient of every sample, but {type(root.module).__name__} mixes the "
                f"samples of a batch{_suspects(root.module)}; call model.eval(), or use MonteCarloFisher or "
                "GaussNewton, which need no single samples"
            )
    w = hessian.space.zeros()
    for piece in hessian.space.views(w):
        piece[:half] = 1
    if any(bool(piece[half:].any()) for piece in hessian.space.views(hessian.matvec(w))):
        raise ValueError(
            "EmpiricalFisher needs a loss that is a sum or mean over samples, but this one couples the outputs of "
            "different samples; use GaussNewton"
        )


class _Disturbed(Evaluation):
    """The network on the whole batch, as recorded in some rows, and with one of these repeated in all others."""

    def agrees(self, values: Sequence[Tensor | None]) -> bool:
        """See `Evaluation.agrees`; of the rows that are as recorded."""
        return super().agrees([v[self.rows] if v is not None and v.ndim else None for v in values])

    def _part(self, leaf: Any) -> Any:
        if not (isinstance(leaf, Tensor) and leaf.ndim and leaf.shape[0] == batch_size(self.outputs)):
            return leaf
        kept = leaf.detach()[self.rows]
        out = kept[:1].expand_as(leaf).clone(memory_format=torch.contiguous_format)
        out[self.rows] = kept
        return out


def _suspects(model: nn.Module) -> str:
    """Name the normalisations over the batch that are in train mode, or keep no running statistics."""
    found = [
        f"{type(module).__name__}{f' {name!r}' if name else ''}"
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or module.running_mean is None)
    ]
    return f" ({', '.join(found)} in train mode)" if found else ""
