"""J from the live autograd graph: Jᵀu by autograd, Jv by differentiating u ↦ Jᵀu (double backward)."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from hessfree.linearization.base import LinearizationError
from hessfree.recording import Output, autocast_as, leaf_hooks_off, space_of, twice_differentiable
from hessfree.vectors import ParameterVector


class GraphLinearization:
    """The widest coverage of all back ends: whatever autograd differentiates twice.

    Jᵀu is linear in u, so its derivative in u, applied to v, is exactly Jv (the "double backward
    trick"). Building the graph of Jᵀu costs about one backward pass, and is put off until the first `jvp`.

    Attributes:
        name: "graph".
        stands_alone: Whether products use neither an autograd graph nor the network: they do.
        space: The flat space `[Z]` of the outputs.
    """

    name = "graph"
    stands_alone = False

    def __init__(self, outputs: Sequence[Output], parameters: ParameterVector) -> None:
        """Linearise the graph that leads to `outputs`.

        Args:
            outputs: The z; their graph must stay alive.
            parameters: The parameters.
        """
        self.space = space_of(outputs)
        self._edges = [o.edge for o in outputs]
        self._values = [o.value for o in outputs]
        self._parameters = parameters
        # edges, and not tensors: what happens to the parameters later (model.double()) cannot cut them off the graph
        self._leaves = [get_gradient_edge(p) for p in parameters.params]
        self._u: list[Tensor] = []
        self._jtu: list[tuple[int, Tensor]] = []

    @property
    def outputs(self) -> Tensor:
        """The outputs z, flat `[Z]`, without graph."""
        if any(v is None for v in self._values):
            raise LinearizationError("the values of the outputs were not kept")
        return self.space.flatten(self._values)

    def jvp(self, v: Tensor) -> Tensor:
        """Return J v `[Z]` for `v` `[P]`."""
        if not self._u:
            self._build()
        if not self._jtu:
            return self.space.zeros()
        pieces = self._parameters.split(v)
        with self._plain():
            found = torch.autograd.grad(
                [t for _, t in self._jtu],
                self._u,
                [pieces[i] for i, _ in self._jtu],
                retain_graph=True,
                allow_unused=True,
            )
        return self.space.flatten(found)

    def vjp(self, u: Tensor) -> Tensor:
        """Return Jᵀ u `[P]` for `u` `[Z]`."""
        return self._parameters.flatten(self._grad(self.space.split(u)))

    def gauss_newton(self, v: Tensor, h: Tensor | float) -> Tensor:
        """Return Jᵀ(h · J v) `[P]` for `v` `[P]` and a number or a diagonal `h` `[Z]`."""
        return self.vjp(self.jvp(v) * h)

    def vjps(self, u: Tensor) -> Tensor:
        """Return Jᵀ applied to each row of `u` `[K, Z]`, as `[K, P]`.

        All rows go through one vectorised backward pass where every operation has a batching rule.

        Args:
            u: Rows in the outputs' space.

        Returns:
            One row a row of `u`.
        """
        rows = [torch.stack(t) for t in zip(*(self.space.split(row) for row in u), strict=True)]
        try:
            found = self._grad(rows, batched=True)
        except RuntimeError:  # an operation of the network cannot be vectorised; one row at a time always works
            return torch.stack([self.vjp(row) for row in u])
        out = u.new_zeros(u.shape[0], self._parameters.size, dtype=self._parameters.dtype)
        for p, t in zip(self._parameters.params, found, strict=True):
            if t is not None:
                out[:, self._parameters.slice_of(p)] = t.reshape(u.shape[0], -1).to(out.dtype)
        return out

    def _grad(self, u: Sequence[Tensor], batched: bool = False) -> tuple[Tensor | None, ...]:
        with self._plain():  # a checkpoint recomputes its part of the network here
            return torch.autograd.grad(
                self._edges, self._leaves, u, retain_graph=True, allow_unused=True, is_grads_batched=batched
            )

    @contextlib.contextmanager
    def _plain(self) -> Generator[None]:
        """Differentiate by operators that can be differentiated, and in the precision that the graph has."""
        with twice_differentiable(), autocast_as((), self.space.device), leaf_hooks_off(self._parameters.params):
            yield

    def _build(self) -> None:
        device = self.space.device
        self._u = [
            torch.zeros(shape, dtype=dtype, device=device, requires_grad=True)
            for shape, dtype in zip(self.space.shapes, self.space.dtypes, strict=True)
        ]
        with torch.enable_grad(), self._plain():
            found = torch.autograd.grad(self._edges, self._leaves, self._u, create_graph=True, allow_unused=True)
        self._jtu = [(i, t) for i, t in enumerate(found) if t is not None and t.requires_grad]
