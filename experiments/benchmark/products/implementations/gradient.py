"""One gradient of the loss: the unit that set-ups and memory are measured in."""

import torch
from torch import Tensor

from experiments.benchmark.products.implementations.base import Product


class Gradient(Product):
    """A forward and a backward pass of the same batch; `v` is not looked at."""

    name = "one gradient"
    is_product = False

    def product(self, v: Tensor) -> tuple[Tensor, ...]:
        """Return the gradient, a tensor a parameter."""
        one = self.workload
        return torch.autograd.grad(one.loss(one.model(one.inputs), one.targets), one.parameters)

    def decode(self, product: tuple[Tensor, ...]) -> Tensor:
        """Lay the pieces end to end."""
        return torch.cat([piece.reshape(-1) for piece in product])
