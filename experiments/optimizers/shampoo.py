"""Shampoo: gradients between inverse roots of their two second-moment matrices."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from torch import nn
from torch.optim import Optimizer

from experiments.optimizers.first_order import FirstOrderSettings

_GRAFT_RMSPROP = 3  # pytorch_optimizer's LayerWiseGrafting.RMSPROP: not exported, and an IntEnum


@dataclass(frozen=True, kw_only=True)
class ShampooSettings(FirstOrderSettings):
    """Shampoo (Gupta et al. 2018; Anil et al. 2020, arXiv 2002.09018) of pytorch_optimizer.

    Its steps take their length, layer by layer, from RMSProp ("grafting"), without which no rate suits all layers, and
    their direction from inverse roots that are renewed every few steps. The other settings are the package's. Its
    RMSProp starts from zero without Adam's correction, so that the first steps are thirty times Adam's: they need a
    warm-up.

    Attributes:
        every: Steps between updates of the inverse roots.
        widest: Larger matrices are preconditioned in blocks of this size.
    """

    package: ClassVar[str | None] = "pytorch_optimizer"

    warmup: float = 0.1
    every: int = 10
    widest: int = 512

    def _at(self, lr: float, parameters: Iterable[nn.Parameter]) -> Optimizer:
        from experiments.optimizers.resumable_shampoo import ResumableShampoo

        return ResumableShampoo(
            parameters,
            lr=lr,
            weight_decay=self.weight_decay,
            moving_average_for_momentum=True,
            preconditioning_compute_steps=self.every,
            block_size=self.widest,
            graft_type=_GRAFT_RMSPROP,
        )
