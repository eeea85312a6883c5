"""Do the samples of a batch have gradients of their own? Asked of the network and of the loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hessfree.linearization import Evaluation, batch_size, single_root, without_samples
from hessfree.losses import OutputHessian
from hessfree.recording import Cut, Trace
from hessfree.vectors import ParameterVector


def check_independent(
    recorded: Trace, cut: Cut, hessian: OutputHessian, parameters: ParameterVector, parts: Sequence[slice] = ()
) -> None:
    """Raise unless the loss is a sum over samples, of which each depends on its own input alone.

    The network is run four times more, with half of the inputs replaced, and the same random numbers: the outputs of
    the other half must stay. The Hessian of the loss is multiplied by vectors that are zero in one half.

    Args:
        recorded: A run of the network and its loss.
        cut: Its cut.
        hessian: Of the loss in z.
        parameters: The parameters.
        parts: Which samples the network is run on at a time, where it was recorded so; empty for all.

    Raises:
        ValueError: It is not so, with the modules that mix samples by name, or it can't be found out.
    """
    count = batch_size(cut.outputs)
    root, reason = single_root(recorded.roots, cut.calls)
    if count == 0:
        reason = f"the outputs of shapes {[tuple(o.shape) for o in cut.outputs]} share no dimension 0 for samples"
    elif root is not None:
        reason = without_samples(root, count)
    if reason:
        raise ValueError(f"EmpiricalFisher needs the gradient of every sample, but {reason}; use MonteCarloFisher")
    assert root is not None
    if not Evaluation(recorded, cut.outputs, cut.calls, parameters).finite():
        return  # numbers that are not finite tell nothing
    if _mixes(recorded, cut, parameters, parts or (slice(0, count),)):
        raise ValueError(
            f"EmpiricalFisher needs the gradient of every sample, but {type(root.module).__name__} mixes the "
            f"samples of a batch{_suspects(root.module)}; call model.eval(), or use MonteCarloFisher or "
            "GaussNewton, which need no single samples"
        )
    if _couples(hessian, count):
        raise ValueError(
            "EmpiricalFisher needs a loss that is a sum or mean over samples, but this one couples the outputs of "
            "different samples; use GaussNewton"
        )


def _couples(hessian: OutputHessian, count: int) -> bool:
    """Tell whether H leads from half of the samples to the other half."""
    for half, others in _halves(count):
        w = hessian.space.zeros()
        for piece in hessian.space.views(w):
            piece[half] = 1
        if any(bool(piece[others].any()) for piece in hessian.space.views(hessian.matvec(w))):
            return True
    return False


def _mixes(recorded: Trace, cut: Cut, parameters: ParameterVector, parts: Sequence[slice]) -> bool:
    """Tell whether the outputs of half of the samples of some part change with the inputs of the other half."""
    return any(
        _Disturbed(recorded, cut, parameters, part, kept).network is None
        for part in parts
        for pair in _halves(part.stop - part.start)
        for kept in pair
    )


def _halves(count: int) -> list[tuple[Tensor, Tensor]]:
    """Divide samples in two: in order, and one of each two neighbours at random, for those may meet in pairs."""
    if count == 1:
        return []
    # on the CPU, from where they index tensors on any device: arguments may be elsewhere than the parameters
    first, second = torch.arange(count, device="cpu").chunk(2)
    pairs = torch.arange(0, count - 1, 2, device="cpu")
    coins = torch.randint(0, 2, pairs.shape, generator=torch.Generator("cpu").manual_seed(0), device="cpu")
    odd = torch.arange(2 * len(pairs), count, device="cpu")
    return [(first, second), (torch.cat([pairs + coins, odd]), pairs + 1 - coins)]


class _Disturbed(Evaluation):
    """The network on a part of the batch: as recorded in some rows, and with one of these repeated in all others."""

    def __init__(self, recorded: Trace, cut: Cut, parameters: ParameterVector, part: slice, kept: Tensor) -> None:
        self._kept = kept  # numbers of the rows within the part
        super().__init__(recorded, cut.outputs, cut.calls, parameters, part)

    def agrees(self, values: Sequence[Tensor | None]) -> bool:
        """See `Evaluation.agrees`; of the rows that are as recorded."""
        return super().agrees([self._seen(v, o.value) for v, o in zip(values, self.outputs, strict=True)])

    def _seen(self, new: Tensor | None, whole: Tensor | None) -> Tensor | None:
        if new is None or whole is None or new.shape != whole[self.rows].shape:
            return None
        out = whole[self.rows].clone()
        # recorded under autocast, z may be rounded to another dtype than this evaluation's
        out[self._kept] = new[self._kept].to(out.dtype)
        return out

    def _part(self, leaf: Any) -> Any:
        rows = super()._part(leaf)
        if rows is leaf:
            return leaf
        kept = rows.detach()[self._kept]
        out = kept[:1].repeat(len(rows), *[1] * (rows.ndim - 1))
        out[self._kept] = kept
        return out


def _suspects(model: nn.Module) -> str:
    """Name the normalisations over the batch that are in train mode, or keep no running statistics."""
    found = [
        f"{type(module).__name__}{f' {name!r}' if name else ''}"
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or module.running_mean is None)
    ]
    return f" ({', '.join(found)} in train mode)" if found else ""
