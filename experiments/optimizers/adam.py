"""Adam, and AdamW."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim import Optimizer

from experiments.optimizers.first_order import FirstOrderSettings


@dataclass(frozen=True, kw_only=True)
class AdamSettings(FirstOrderSettings):
    """torch.optim.Adam (Kingma & Ba 2015)."""

    def _at(self, lr: float, parameters: Iterable[nn.Parameter]) -> Optimizer:
        return torch.optim.Adam(parameters, lr=lr, weight_decay=self.weight_decay)


@dataclass(frozen=True, kw_only=True)
class AdamWSettings(FirstOrderSettings):
    """torch.optim.AdamW (Loshchilov & Hutter 2019): Adam, its weight decay apart from the gradient's moments.

    Attributes:
        weight_decay: Share of the weights that a step of rate 1 takes away; torch's default.
    """

    weight_decay: float = 1e-2

    def _at(self, lr: float, parameters: Iterable[nn.Parameter]) -> Optimizer:
        return torch.optim.AdamW(parameters, lr=lr, weight_decay=self.weight_decay)
