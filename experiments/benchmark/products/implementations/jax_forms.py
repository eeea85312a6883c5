"""JAX, compiled: three forms of the product, of which a user would keep the fastest.

A form that keeps something for the products of one value of the parameters returns it from a compiled set-up as a
pytree of arrays (`jax.linearize` and `jax.vjp` return such), so that new parameters compile nothing.
"""

import abc
from typing import Any

import numpy as np
import torch
from torch import Tensor

from experiments.benchmark.products.implementations import jax_networks
from experiments.benchmark.products.implementations.base import Product, UnsupportedError
from experiments.benchmark.products.workloads import Workload


class _Jax(Product):
    """What the forms share: the network, its parameters, and the Hessian of the loss in the outputs."""

    package = "jax"
    requirement = "jax"
    counts_memory = False

    def __init__(self, workload: Workload) -> None:
        """Write the functions down; the first set-up and product compile them.

        Args:
            workload: What to multiply by.

        Raises:
            UnsupportedError: If the workload is not on the CPU, or not written in JAX.
        """
        super().__init__(workload)
        if workload.device.type != "cpu":
            raise UnsupportedError(f"measured on the CPU alone, and this is {workload.device}")
        import jax

        apply, loss = jax_networks.forward(workload.model), jax_networks.loss(workload)
        x, y = (jax.numpy.asarray(tensor.numpy()) for tensor in (workload.inputs, workload.targets))
        self._outputs = lambda parameters: apply(parameters, x)
        self._curve = lambda z, along: jax.jvp(jax.grad(lambda z: loss(z, y)), (z,), (along,))[1]
        self._keeper, self._product = jax.jit(self._keep), jax.jit(self._multiply)
        self.refresh()

    def refresh(self) -> None:
        """Copy the parameters out of torch."""
        self._parameters = self._tree([parameter.detach() for parameter in self.workload.parameters])

    def setup(self) -> None:
        """Run the compiled set-up."""
        import jax

        self.kept = jax.block_until_ready(self._keeper(self._parameters))

    def encode(self, v: Tensor) -> Any:
        """Cut the vector into a dict of arrays, the form of the parameters."""
        return self._tree(self.workload.split(v))

    def product(self, v: Any) -> Any:
        """Run the compiled product, and wait for it."""
        import jax

        return jax.block_until_ready(self._product(self.kept, v))

    def decode(self, product: Any) -> Tensor:
        """Lay the arrays end to end."""
        names = [name for name, _ in self.workload.model.named_parameters()]
        return torch.cat([torch.from_numpy(np.array(product[name])).reshape(-1) for name in names])

    def _tree(self, tensors: list[Tensor]) -> dict[str, Any]:
        import jax

        names = [name for name, _ in self.workload.model.named_parameters()]
        # a copy: JAX may else share the memory that torch changes in place
        return {name: jax.numpy.array(tensor.numpy(), copy=True) for name, tensor in zip(names, tensors, strict=True)}

    @abc.abstractmethod
    def _keep(self, parameters: Any) -> Any:
        """Return what products at these parameters share; compiled."""

    @abc.abstractmethod
    def _multiply(self, kept: Any, v: Any) -> Any:
        """Return G v; compiled."""


class JaxAnew(_Jax):
    """jvp and vjp anew in every product."""

    name = "JAX, jvp + vjp"

    def setup(self) -> None:
        """Keep the parameters themselves."""
        self.kept = self._parameters

    def _keep(self, parameters: Any) -> Any:
        return parameters

    def _multiply(self, kept: Any, v: Any) -> Any:
        import jax

        z, along = jax.jvp(self._outputs, (kept,), (v,))
        return jax.vjp(self._outputs, kept)[1](self._curve(z, along))[0]


class JaxLinearize(_Jax):
    """jax.linearize once for every value of the parameters, and its transpose."""

    name = "JAX, linearize once"

    def _keep(self, parameters: Any) -> Any:
        import jax

        return jax.linearize(self._outputs, parameters)

    def _multiply(self, kept: Any, v: Any) -> Any:
        import jax

        z, push = kept
        return jax.linear_transpose(push, v)(self._curve(z, push(v)))[0]


class JaxDoubleReverse(_Jax):
    """jax.vjp once for every value of the parameters, and its transpose."""

    name = "JAX, double reverse"

    def _keep(self, parameters: Any) -> Any:
        import jax

        return jax.vjp(self._outputs, parameters)

    def _multiply(self, kept: Any, v: Any) -> Any:
        import jax

        z, pull = kept
        (along,) = jax.linear_transpose(lambda u: pull(u)[0], z)(v)
        return pull(self._curve(z, along))[0]
