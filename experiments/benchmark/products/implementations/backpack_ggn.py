"""BackPACK: `ggn_vector_product_from_plist` on a graph that is built once for every value of the parameters."""

import torch
from torch import Tensor

from experiments.benchmark.products.implementations.base import Product


class Backpack(Product):
    """Double backward on lists of tensors; its extensions of modules are not needed for this."""

    name = "BackPACK"
    package = "backpack"
    requirement = "backpack-for-pytorch"

    def setup(self) -> None:
        """Evaluate the network and the loss, and keep their graph."""
        outputs = self.workload.model(self.workload.inputs)
        self.kept = self.workload.loss(outputs, self.workload.targets), outputs

    def encode(self, v: Tensor) -> list[Tensor]:
        """Cut the vector into the shapes of the parameters."""
        return self.workload.split(v)

    def product(self, v: list[Tensor]) -> tuple[Tensor, ...]:
        """Return G v as a tensor a parameter."""
        from backpack.hessianfree.ggnvp import ggn_vector_product_from_plist

        loss, outputs = self.kept
        return ggn_vector_product_from_plist(loss, outputs, self.workload.parameters, v)

    def decode(self, product: tuple[Tensor, ...]) -> Tensor:
        """Lay the pieces end to end."""
        return torch.cat([piece.reshape(-1) for piece in product])
