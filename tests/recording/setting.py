"""A network with buffers and random numbers, whose closures are recorded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hessfree.recording import CallTree, Owners, Recording, record
from hessfree.vectors import ParameterVector
from tests.architectures import randn


class Setting:
    """A network, a batch, and `run` to record a closure."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2)).double()
        self.x, self.y = randn(6, 3), randn(6, 2)
        self.parameters = ParameterVector(list(self.model.parameters()))
        self.tree = CallTree(Owners(self.parameters), self.parameters.device, lambda _: True, lambda _: True)

    def loss(self) -> Tensor:
        return F.mse_loss(self.model(self.x), self.y)

    def run(self, closure: Callable[[], Any]) -> Recording:
        return record(closure, self.parameters, self.tree)


def no_hooks_left() -> bool:
    hooks = nn.modules.module
    return not (
        hooks._global_forward_hooks
        or hooks._global_forward_pre_hooks
        or hooks._global_forward_hooks_always_called
        or torch.overrides._get_current_function_mode_stack()
    )
