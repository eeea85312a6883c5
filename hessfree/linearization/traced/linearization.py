"""J as traced operators: no autograd, no graph, nothing but kernels at a product."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence

import torch
from torch import Tensor

from hessfree.linearization.base import LinearizationError
from hessfree.linearization.traced.cache import TraceCache
from hessfree.linearization.traced.network import Arguments, Network
from hessfree.linearization.traced.surroundings import surroundings
from hessfree.recording import Call, Output, autocast_as
from hessfree.vectors import ParameterVector


class TracedLinearization:
    """One recorded call, linearised at the present parameters by a trace made once.

    A new value of the parameters costs one forward pass; a new signature (shapes, dtypes, train flags,
    settings of modules) one trace, of 0.1 to a few seconds. Residuals of the forward pass are views of the
    parameters, buffers and inputs: once one of them is written into, products raise a RuntimeError, as those of an
    autograd graph do.

    Attributes:
        name: "traced".
        space: The flat space `[Z]` of the outputs.
        stands_alone: Whether products use neither an autograd graph nor the network.
        recorded: Whether these are the outputs of the recorded call itself, which ran no second time.
    """

    name = "traced"
    stands_alone = True
    recorded = False

    def __init__(
        self,
        root: Call,
        outputs: Sequence[Output],
        parameters: ParameterVector,
        cache: TraceCache,
        arguments: Arguments | None = None,
    ) -> None:
        """Linearise.

        The buffers of the module should be what they were before the recorded call.

        Args:
            root: A recorded outermost call.
            outputs: z: outputs of this call, or of calls that it made.
            parameters: The parameters.
            cache: Where traces are kept.
            arguments: Positional and keyword arguments in place of the recorded ones: a part of the batch.

        Raises:
            LinearizationError: The network cannot be traced; the message says why.
        """
        network = Network(root, outputs, parameters, arguments, root.autocast if cache.keeps_autocast else ())
        whole = arguments is None or (arguments[0] is root.inputs and arguments[1] is root.keywords)
        whole = whole and network.autocast == root.autocast
        self._trace = cache.get(network, parameters)
        self._surroundings = surroundings(network.parts)
        self._device = parameters.device
        self.space = self._trace.space
        self._outputs, residuals = self._evaluate(network, outputs, parameters, whole)
        self._output_versions = [t._version for t in self._outputs]
        self._forward = self._trace.jvp.arguments(residuals)
        self._backward = self._trace.vjp.arguments(residuals)
        given = {t.untyped_storage()._cdata for t in (*parameters.params, *network.state, *network.inputs)}
        # what autograd saved belongs to it, and so does what is a view of an argument
        self._borrowed = [t for t in residuals if self.recorded or t.untyped_storage()._cdata in given]
        self._versions = [t._version for t in self._borrowed]

    def _evaluate(
        self, network: Network, outputs: Sequence[Output], parameters: ParameterVector, whole: bool
    ) -> tuple[list[Tensor], tuple[Tensor, ...]]:
        """Return z and the residuals: those of the recorded call itself where they can be had."""
        trace = self._trace
        readable = whole and all(o.intact for o in outputs)
        if readable and trace.trusted:
            saved = trace.saved_residuals(outputs, parameters)
            if saved is not None:
                self.recorded = True
                return [o.value for o in outputs if o.value is not None], saved
        z, residuals = trace.evaluate(network, parameters)
        values = self.space.views(z)
        if readable and not trace.trusted:
            residuals = trace.saved_residuals(outputs, parameters, residuals) or residuals
        return values, residuals

    @property
    def outputs(self) -> Tensor:
        """The outputs z, flat `[Z]`, without graph.

        Raises:
            LinearizationError: They are those of the recorded call, and have been written into since.
        """
        if [t._version for t in self._outputs] != self._output_versions:
            raise LinearizationError("the outputs were written into after the network returned them")
        return self.space.flatten(self._outputs)

    @property
    def trusted(self) -> bool:
        """Whether a trace of this signature was accepted before; else compare its products with another's."""
        return self._trace.trusted

    @property
    def doubtful(self) -> bool:
        """Whether the Jacobian may have changed since, though the outputs do not show it; then compare one product.

        So it is where a custom Function or a hook decides on the backward pass, and where something changed that no
        trace can see: a settings object, a function, a global.
        """
        return self._trace.opaque or self._surroundings != self._trace.surroundings

    def accept(self) -> None:
        """Remember that the products of this signature are right, in these surroundings."""
        self._trace.trusted = True
        self._trace.surroundings = self._surroundings

    def reject(self, fault: str) -> None:
        """Remember that they are not: later attempts end in a LinearizationError that says `fault`."""
        self._trace.fault = fault

    def jvp(self, v: Tensor) -> Tensor:
        """Return J v `[Z]` for `v` `[P]`."""
        with self._products():
            return self._trace.jvp(v, self._forward)

    def vjp(self, u: Tensor) -> Tensor:
        """Return Jᵀ u `[P]` for `u` `[Z]`."""
        with self._products():
            return self._trace.vjp(u, self._backward)

    def vjps(self, u: Tensor) -> Tensor:
        """Return Jᵀ applied to each row of `u` `[K, Z]`, as `[K, P]`."""
        with self._products():
            return self._trace.vjp.rows(u, self._backward)

    def gauss_newton(self, v: Tensor, h: Tensor | float) -> Tensor:
        """Return Jᵀ(h · J v) `[P]` in one go, where the Hessian of the loss in z is diagonal.

        Args:
            v: `[P]`.
            h: The diagonal, a number or `[Z]`.

        Returns:
            The product.
        """
        with self._products():
            forward, backward = self._trace.jvp, self._trace.vjp
            first = forward.replay(v, self._forward)
            second = None if first is None else backward.replay(first.output, self._backward)
            if first is None or second is None:
                return backward(forward(v, self._forward).mul_(h), self._backward)
            first.input.copy_(v)
            first.run(*self._forward)
            torch.mul(first.output, h, out=second.input)
            second.run(*self._backward)
            return second.output.clone()

    @contextlib.contextmanager
    def _products(self) -> Generator[None]:
        if [t._version for t in self._borrowed] != self._versions:
            raise RuntimeError(
                "a parameter, buffer or input of the network was written into after it was linearised, and products "
                "would mix old values with new ones; linearise it again"
            )
        with torch.no_grad(), autocast_as((), self._device):
            yield
