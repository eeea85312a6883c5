"""torch.func without any library: what a forum answer gives, evaluated anew for every product."""

import abc
from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import functional_call, jvp, linearize, vjp

from experiments.benchmark.products.implementations.base import Product
from experiments.benchmark.products.workloads import Workload

Parameters = dict[str, Tensor]


class _Anew(Product):
    """Jᵀ(H(J v)) from three calls of torch.func, none of them kept."""

    def __init__(self, workload: Workload) -> None:
        """Name the parameters.

        Args:
            workload: What to multiply by.
        """
        super().__init__(workload)
        self._named = {name: parameter.detach() for name, parameter in workload.model.named_parameters()}

    def _outputs(self, parameters: Parameters) -> Tensor:
        return functional_call(self.workload.model, parameters, (self.workload.inputs,))

    def product(self, v: Tensor) -> Tensor:
        """Return G v `[P]`."""
        outputs, along = self._forward(dict(zip(self._named, self.workload.split(v), strict=True)))
        leaf = outputs.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(self.workload.loss(leaf, self.workload.targets), leaf, create_graph=True)
        (curved,) = torch.autograd.grad(gradient, leaf, along)
        pull: Callable[[Tensor], tuple[Parameters]] = vjp(self._outputs, self._named)[1]
        (product,) = pull(curved)
        return torch.cat([product[name].reshape(-1) for name in self._named])

    @abc.abstractmethod
    def _forward(self, v: Parameters) -> tuple[Tensor, Tensor]:
        """Return the outputs, and J v."""


class JvpAnew(_Anew):
    """Forward mode by torch.func.jvp, then vjp."""

    name = "jvp + vjp anew"

    def _forward(self, v: Parameters) -> tuple[Tensor, Tensor]:
        outputs, along = jvp(self._outputs, (self._named,), (v,))[:2]
        return outputs, along


class LinearizeAnew(_Anew):
    """torch.func.linearize for a single product: the forum script. It traces the network every time."""

    name = "linearize + vjp anew"

    def _forward(self, v: Parameters) -> tuple[Tensor, Tensor]:
        outputs, push = linearize(self._outputs, self._named)
        return outputs, push(v)
