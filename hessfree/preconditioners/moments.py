"""First and second moments of a layer's input over the data, where they are known and not averaged over batches."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn


@dataclasses.dataclass(frozen=True, eq=False)
class InputMoments:
    """E[a] and E[a aᵀ] of a layer's input a.

    Attributes:
        mean: E[a], `[in]`.
        second: E[a aᵀ], `[in, in]`, in the units of a squared; not centred.
    """

    mean: Tensor
    second: Tensor

    def __post_init__(self) -> None:
        """Check that such an input exists.

        Raises:
            ValueError: A shape is wrong, a number is not finite, or the covariance is not positive semi-definite.
        """
        mean, second = self.mean, self.second
        shapes = f"mean has shape {list(mean.shape)} and second {list(second.shape)}"
        if mean.ndim != 1 or second.shape != (*mean.shape, *mean.shape):
            raise ValueError(f"{shapes}, and must be [n] and [n, n] for a layer of n inputs (without its bias)")
        if not (mean.is_floating_point() and second.is_floating_point()):
            raise ValueError(f"mean is {mean.dtype} and second {second.dtype}; give floating-point tensors")
        if not bool(torch.isfinite(mean).all() and torch.isfinite(second).all()):
            raise ValueError(f"{shapes}, and hold numbers that are not finite; take them from finite data")
        tolerance = torch.finfo(second.dtype).eps ** 0.5
        largest = second.abs().max() if second.numel() else second.new_zeros(())
        skew = (second - second.T).abs().max() if second.numel() else largest
        if not bool(skew <= tolerance * largest):
            raise ValueError(
                f"second differs from its transpose by {float(skew):.3g} (its largest entry is {float(largest):.3g}), "
                "and E[a a^T] is symmetric: average it with its transpose if this is rounding"
            )
        host = second.detach().cpu().double() - torch.outer(mean, mean).detach().cpu().double()
        least = torch.linalg.eigvalsh(host)[0] if len(host) else host.new_zeros(())
        if not bool(least >= -tolerance * max(len(host), 1) * float(largest)):
            raise ValueError(
                f"the covariance second - mean mean^T has the eigenvalue {float(least):.3g}, and no data have a "
                "negative variance: second must be E[a a^T], not the covariance"
            )

    @classmethod
    def of(cls, rows: Tensor) -> InputMoments:
        """Take the moments of a table.

        Args:
            rows: One input a row, `[N, in]`.

        Returns:
            Its means.
        """
        return cls(rows.mean(0), rows.T @ rows / max(len(rows), 1))

    def factor(self, bias: bool) -> Tensor:
        """Return K-FAC's A.

        Args:
            bias: Whether the layer has a bias, that is a one as the last of its inputs.

        Returns:
            `[in, in]`, or `[in + 1, in + 1]` with `bias`.
        """
        second = 0.5 * (self.second + self.second.T)
        if not bias:
            return second
        column = self.mean.unsqueeze(1)
        return torch.cat([torch.cat([second, column], 1), torch.cat([column.T, column.new_ones(1, 1)], 1)])


def check_moments(layer: object, moments: object) -> None:
    """Check that `moments` can be those of the input of `layer`.

    Args:
        layer: A Linear layer, or its weight.
        moments: Its `InputMoments`.

    Raises:
        ValueError: They are not, or the layer is of another kind.
    """
    weight = layer.weight if isinstance(layer, nn.Linear) else layer
    if not (isinstance(weight, Tensor) and weight.ndim == 2):
        what = f"a tensor of shape {list(weight.shape)}" if isinstance(weight, Tensor) else type(layer).__name__
        raise ValueError(f"input_moments has {what} as a key; give an nn.Linear, or its weight [out, in]")
    if not isinstance(moments, InputMoments):
        raise ValueError(f"input_moments has a {type(moments).__name__} as a value; give InputMoments(mean, second)")
    if len(moments.mean) != weight.shape[1]:
        raise ValueError(
            f"input_moments has moments of {len(moments.mean)} inputs for a weight of shape {list(weight.shape)}, "
            f"which takes {weight.shape[1]}; leave the bias out: it is added where the layer has one"
        )
