"""SOAP: Adam in the eigenbases of Shampoo's factors."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from torch import nn
from torch.optim import Optimizer

from experiments.optimizers.first_order import FirstOrderSettings


@dataclass(frozen=True, kw_only=True)
class SOAPSettings(FirstOrderSettings):
    """SOAP (Vyas et al. 2025, arXiv 2409.11321) of the package pytorch_optimizer.

    Of the packages that have it this one adds the least to a step: on a ToyMLP in two dimensions, 256 rows, one
    thread, 0.8 ms to Adam's 1.7, where heavyball's adds 7.9. The other settings are the paper's.

    Attributes:
        weight_decay: Coefficient of the decoupled weight decay.
        widest: A side of a weight matrix that is wider is left as it is: one-sided SOAP. On both sides of a matrix of
            785 columns its QR would make the step four times as long (28 ms for 7.6).
        every: Steps between updates of the eigenbases.
    """

    package: ClassVar[str | None] = "pytorch_optimizer"

    widest: int = 512
    every: int = 10

    def _at(self, lr: float, parameters: Iterable[nn.Parameter]) -> Optimizer:
        from pytorch_optimizer import SOAP

        return SOAP(
            parameters,
            lr=lr,
            weight_decay=self.weight_decay,
            precondition_frequency=self.every,
            max_precondition_dim=self.widest,
        )
