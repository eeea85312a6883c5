"""Stochastic gradient descent with Nesterov's momentum."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from torch.optim import Optimizer

from experiments.optimizers.first_order import FirstOrderSettings


@dataclass(frozen=True, kw_only=True)
class SGDSettings(FirstOrderSettings):
    """torch.optim.SGD with Nesterov's momentum (Sutskever et al. 2013).

    Attributes:
        momentum: Share of the last step that goes into the next.
    """

    lr_grid: ClassVar[tuple[float, ...]] = (3e-3, 1e-2, 3e-2, 1e-1)

    momentum: float = 0.9

    def _at(self, lr: float, parameters: Iterable[nn.Parameter]) -> Optimizer:
        return torch.optim.SGD(
            parameters,
            lr=lr,
            momentum=self.momentum,
            nesterov=self.momentum > 0,
            weight_decay=self.weight_decay,
        )
