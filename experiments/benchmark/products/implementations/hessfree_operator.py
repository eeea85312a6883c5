"""Ours: `GaussNewton.from_loss`, with the default back end and with others by name."""

from typing import ClassVar

from torch import Tensor

from experiments.benchmark.products.implementations.base import Product
from hessfree import GaussNewton


class Hessfree(Product):
    """The operator as a user makes it, anew for every value of the parameters."""

    name = "hessfree"
    backend: ClassVar[str] = "auto"

    @property
    def detail(self) -> str:
        """The back end that came."""
        return self.kept.linearization.name if self.kept is not None else ""

    def setup(self) -> None:
        """Build the operator."""
        one = self.workload
        self.kept = GaussNewton.from_loss(one.model, one.loss, one.inputs, one.targets, linearization=self.backend)

    def product(self, v: Tensor) -> Tensor:
        """Return G v `[P]`."""
        return self.kept @ v


class HessfreeGraph(Hessfree):
    """Double backward on the live graph."""

    name = "hessfree, graph"
    backend = "graph"


class HessfreeFunctional(Hessfree):
    """torch.func.linearize and vjp, once for every value of the parameters."""

    name = "hessfree, functional"
    backend = "functional"
