"""A network and its loss, as a user's closure computes them and as an oracle sees them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from hessfree.vectors import ParameterVector
from tests.architectures import DOUBLE

Z = tuple[Tensor, ...]


@dataclasses.dataclass
class Problem:
    """A network and a loss, as a user's closure computes them and as the oracle sees them."""

    model: nn.Module  # owns every parameter
    forward: Callable[[], Tensor]  # the loss, in a user's words
    outputs: Callable[[], Z]  # z, where the cut should be
    ell: Callable[[Z], Tensor]  # the loss as a function of z (and of the parameters that it uses directly)
    cut: str  # what find_cut should say
    inputs: Any = None  # for the operators' from_loss, where one call of the model gives z
    loss_fn: Callable[[Any, Any], Tensor] | None = None
    targets: Any = None
    direct: bool = False
    functional: bool = True  # whether torch.func serves it; else the graph takes over with a warning

    @property
    def parameters(self) -> ParameterVector:
        return ParameterVector([p for p in self.model.parameters() if p.requires_grad])

    def closure(self) -> Tensor:
        self.model.zero_grad()
        loss = self.forward()
        loss.backward()
        return loss


def simple(
    model: nn.Module,
    inputs: Any,
    loss_fn: Callable[[Any, Any], Tensor],
    targets: Any = None,
    *,
    cut: str | None = None,
    functional: bool = True,
) -> Problem:
    """A model whose one output tensor is z."""
    model = model.to(DOUBLE)
    args = inputs if isinstance(inputs, tuple) else (inputs,)
    return Problem(
        model,
        forward=lambda: loss_fn(model(*args), targets),
        outputs=lambda: (model(*args),),
        ell=lambda z: loss_fn(z[0], targets),
        cut=cut or f"outputs of {type(model).__name__}",
        inputs=inputs,
        loss_fn=loss_fn,
        targets=targets,
        functional=functional,
    )


def hand_written(z: Tensor, y: Tensor) -> Tensor:
    """Neither convex nor separable: its blocks are dense and indefinite."""
    r = z - y
    return (1 + r.square().sum(-1) + r.prod(-1)).square().log1p().mean()


def softplus_pairs(z: Tensor, y: Tensor) -> Tensor:
    """Couples the samples of a batch: a ranking loss."""
    return F.softplus(z[:, None] - z[None] - y[:, None] + y[None]).mean()
