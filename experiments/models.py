"""The network of the experiments: a small multilayer perceptron for a velocity field v(x, t)."""

import torch
from torch import Tensor, nn


def time_column(x: Tensor, t: Tensor | float) -> Tensor:
    """Bring every accepted form of the time to one column.

    Args:
        x: Points, `[..., D]`; only the shape, dtype and device are used.
        t: A number or tensor of one element (one time for all points), or one time a point as `[...]` or `[..., 1]`.

    Returns:
        The times as `[..., 1]`, in the dtype and on the device of `x`.

    Raises:
        ValueError: If the shape of `t` fits none of these forms.
    """
    t = torch.as_tensor(t, dtype=x.dtype, device=x.device)
    column = (*x.shape[:-1], 1)
    if t.shape == column:
        return t
    if t.shape == x.shape[:-1]:
        return t.unsqueeze(-1)
    if t.numel() == 1:
        return t.reshape(()).expand(column)
    raise ValueError(
        f"t has shape {list(t.shape)}, which gives no time for each point of x of shape {list(x.shape)}: "
        f"pass a number, {list(x.shape[:-1])} or {list(column)}"
    )


class ToyMLP(nn.Module):
    """A SELU perceptron, the `MLP` of torchcfm with the number of hidden layers as an argument.

    `n_hidden` SELU layers of width `w` and a linear one: with the defaults Linear(dim, w), Linear(w, w), Linear(w, w),
    Linear(w, out_dim). A time-varying network takes the time as one more input, so the two-dimensional velocity field
    of the experiments, `ToyMLP(2, time_varying=True)`, has 8706 parameters.

    Source: https://github.com/atong01/conditional-flow-matching, torchcfm/models/models.py.
    """

    def __init__(
        self, dim: int, out_dim: int | None = None, w: int = 64, time_varying: bool = False, n_hidden: int = 3
    ) -> None:
        """Build the layers with torch's default initial weights.

        Args:
            dim: Number of components of a point.
            out_dim: Number of outputs; None: `dim`.
            w: Width of the hidden layers.
            time_varying: Whether the network also takes a time.
            n_hidden: Number of hidden layers.

        Raises:
            ValueError: If a size is not a positive integer.
        """
        super().__init__()
        out_dim = dim if out_dim is None else out_dim
        for name, size in (("dim", dim), ("out_dim", out_dim), ("w", w), ("n_hidden", n_hidden)):
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise ValueError(f"{name}={size!r} is not a size: give a positive integer")
        self.dim = dim
        self.time_varying = time_varying
        widths = [dim + int(time_varying), *[w] * n_hidden]
        layers: list[nn.Module] = []
        for fan_in, fan_out in zip(widths, widths[1:], strict=False):
            layers += [nn.Linear(fan_in, fan_out), nn.SELU()]
        self.net = nn.Sequential(*layers, nn.Linear(w, out_dim))

    def forward(self, x: Tensor, t: Tensor | float | None = None) -> Tensor:
        """Evaluate the field.

        Args:
            x: Points, `[..., dim]`; or, for a time-varying network called without `t`, points with their time as last
                component, `[..., dim + 1]`.
            t: The time, in any form that `time_column` takes; None for a network without time.

        Returns:
            The outputs, `[..., out_dim]`.

        Raises:
            ValueError: If the shapes of `x` and `t` do not fit the network or each other.
        """
        if t is not None:
            if not self.time_varying:
                raise ValueError(f"t={t!r} was given to a network without time: build it with time_varying=True")
            self._check_columns(x, self.dim)
            x = torch.cat([x, time_column(x, t)], dim=-1)
        else:
            self._check_columns(x, self.dim + int(self.time_varying))
        return self.net(x)

    def _check_columns(self, x: Tensor, columns: int) -> None:
        if x.dim() > 0 and x.shape[-1] == columns:
            return
        cure = f"pass x of shape [..., {self.dim}]"
        if self.time_varying:
            cure += f" and t, or both concatenated as [..., {self.dim + 1}]"
        raise ValueError(f"x has shape {list(x.shape)}, but this network takes {columns} components here: {cure}")
