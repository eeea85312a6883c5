"""The networks of one closure side by side: z is what all of them returned."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hessfree.linearization.base import LinearizationError
from hessfree.linearization.traced.cache import TraceCache
from hessfree.linearization.traced.linearization import TracedLinearization
from hessfree.linearization.traced.network import Arguments, refuse_dependent_inputs
from hessfree.recording import Call, Output
from hessfree.vectors import FlatSpace, ParameterVector


class StackedLinearization:
    """J = [J₁; J₂; ...] of several calls, none of whose inputs depends on another's outputs.

    Attributes:
        name: "traced".
        stands_alone: Whether products use neither an autograd graph nor the network.
        space: The flat space `[Z]` of all outputs, call by call.
    """

    name = "traced"
    stands_alone = True

    def __init__(self, parts: Sequence[TracedLinearization]) -> None:
        """Stack linearisations in the same parameters."""
        self._parts = parts
        self._sizes = [part.space.size for part in parts]
        shapes = [shape for part in parts for shape in part.space.shapes]
        dtypes = [dtype for part in parts for dtype in part.space.dtypes]
        self.space = FlatSpace(shapes, dtypes, parts[0].space.device)

    @property
    def outputs(self) -> Tensor:
        """The outputs z, flat `[Z]`, without graph."""
        return self._joined([part.outputs for part in self._parts])

    @property
    def recorded(self) -> bool:
        """Whether no part ran a second time: the outputs are those of the recorded calls."""
        return all(part.recorded for part in self._parts)

    @property
    def trusted(self) -> bool:
        """Whether the products of every part were accepted before."""
        return all(part.trusted for part in self._parts)

    @property
    def doubtful(self) -> bool:
        """Whether the Jacobian of some part may have changed; see `TracedLinearization.doubtful`."""
        return any(part.doubtful for part in self._parts)

    def accept(self) -> None:
        """Remember that the products of these signatures are right."""
        for part in self._parts:
            part.accept()

    def reject(self, fault: str) -> None:
        """Remember that they are not."""
        for part in self._parts:
            part.reject(fault)

    def jvp(self, v: Tensor) -> Tensor:
        """Return J v `[Z]` for `v` `[P]`."""
        return self._joined([part.jvp(v) for part in self._parts])

    def vjp(self, u: Tensor) -> Tensor:
        """Return Jᵀ u `[P]` for `u` `[Z]`."""
        return self._sum([part.vjp(piece) for part, piece in self._split(u)])

    def vjps(self, u: Tensor) -> Tensor:
        """Return Jᵀ applied to each row of `u` `[K, Z]`, as `[K, P]`."""
        return self._sum([part.vjps(piece) for part, piece in self._split(u)])

    def gauss_newton(self, v: Tensor, h: Tensor | float) -> Tensor:
        """Return Jᵀ(h · J v) `[P]`; see `TracedLinearization.gauss_newton`.

        Args:
            v: `[P]`.
            h: The diagonal, a number or `[Z]`.

        Returns:
            The product.
        """
        if not isinstance(h, Tensor) or h.ndim == 0:
            return self._sum([part.gauss_newton(v, h) for part in self._parts])
        return self._sum([part.gauss_newton(v, piece) for part, piece in self._split(h)])

    def _split(self, u: Tensor) -> list[tuple[TracedLinearization, Tensor]]:
        kept = [part.space.dtype for part in self._parts]
        pieces = [t.to(dtype) for t, dtype in zip(u.split(self._sizes, -1), kept, strict=True)]
        return list(zip(self._parts, pieces, strict=True))

    def _joined(self, pieces: Sequence[Tensor]) -> Tensor:
        return torch.cat([piece.to(self.space.dtype) for piece in pieces])

    @staticmethod
    def _sum(products: Sequence[Tensor]) -> Tensor:
        total = products[0]
        for product in products[1:]:
            total.add_(product)
        return total


def linearize_calls(
    roots: Sequence[Call],
    calls: Sequence[Call],
    outputs: Sequence[Output],
    parameters: ParameterVector,
    cache: TraceCache,
    arguments: Arguments | None = None,
) -> TracedLinearization | StackedLinearization:
    """Linearise the outermost calls that `outputs` came from.

    The buffers of the modules should be what they were before the recorded calls.

    Args:
        roots: The outermost calls of a recording.
        calls: The calls that z came from, these or some that they made; empty if z was marked.
        outputs: z.
        parameters: The parameters.
        cache: Where traces are kept.
        arguments: Positional and keyword arguments in place of the recorded ones, where the outputs came from one
            outermost call: a part of the batch.

    Returns:
        The linearisation.

    Raises:
        LinearizationError: It cannot be traced; the message says why.
    """
    if not calls:
        raise LinearizationError("the outputs were marked, and come from no module's call")
    owners = {id(output): roots[call.path[0]] for call in calls for output in call.outputs}
    groups: list[tuple[Call, list[Output]]] = []
    for output in outputs:
        root = owners[id(output)]
        if not groups or groups[-1][0] is not root:
            groups.append((root, []))
        groups[-1][1].append(output)
    if len(groups) == 1:
        return TracedLinearization(groups[0][0], outputs, parameters, cache, arguments)
    if arguments is not None:
        raise LinearizationError("the outputs come from several calls, of which no part can be taken")
    for root, _ in groups:  # before the first of them is evaluated in vain
        refuse_dependent_inputs(root, parameters)
    return StackedLinearization([TracedLinearization(root, part, parameters, cache) for root, part in groups])
