"""J by `torch.func.linearize` and `torch.func.vjp`, the pair that the literature names: the reference in tests."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Generator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, linearize, vjp, vmap
from torch.utils._pytree import tree_leaves

from hessfree.linearization.base import LinearizationError, in_words
from hessfree.recording import Call, Output, RandomState, twice_differentiable
from hessfree.vectors import FlatSpace, ParameterVector


class FunctionalLinearization:
    """Re-evaluates the recorded calls as a pure function of the parameters.

    It serves calls whose inputs do not depend on the parameters. Tracing costs 0.1 to 1.3 s at every step,
    and `torch.func.linearize` keeps in-place operations and random draws in the function it returns: random
    draws are reset here before each use, and in-place operations are left to the self-test to find.

    Attributes:
        name: "functional".
        stands_alone: Whether products use neither an autograd graph nor the network: they may.
        space: The flat space `[Z]` of the outputs.
        outputs: z, flat `[Z]`, without graph.
    """

    name = "functional"
    stands_alone = False

    def __init__(self, calls: Sequence[Call], outputs: Sequence[Output], parameters: ParameterVector) -> None:
        """Linearise `calls`.

        Args:
            calls: The recorded calls, in order.
            outputs: z: some of the outputs of `calls`, call by call.
            parameters: The parameters.

        Raises:
            LinearizationError: The calls cannot be evaluated as a function of the parameters alone.
        """
        self._calls = calls
        self._places = [[o.leaf for o in call.outputs if o in outputs] for call in calls]
        self._parameters = parameters
        if not calls:
            raise LinearizationError("the outputs were marked, and come from no single module")
        for call in calls:
            if not call.inputs and not call.keywords:
                raise LinearizationError(f"the inputs of {type(call.module).__name__} were not kept")
            if any(isinstance(t, Tensor) and t.requires_grad for t in tree_leaves((call.inputs, call.keywords))):
                raise LinearizationError(f"the inputs of {type(call.module).__name__} require grad")
        self._names = [_names(call.module, parameters) for call in calls]
        primals = tuple(p.detach() for p in parameters.params)
        try:
            with self._forward_mode():
                values, self._jvp = linearize(self._evaluate, *primals)
            with self._world():
                self._vjp = vjp(self._evaluate, *primals)[1]
        except Exception as error:  # whatever a network does that torch.func does not know
            raise LinearizationError(f"torch.func cannot linearise the network ({in_words(error)})") from error
        self.space = FlatSpace([t.shape for t in values], [t.dtype for t in values], values[0].device)
        self.outputs = self.space.flatten(values)

    def jvp(self, v: Tensor) -> Tensor:
        """Return J v `[Z]` for `v` `[P]`."""
        with self._forward_mode():
            return self.space.flatten(self._jvp(*self._parameters.split(v)))

    def vjp(self, u: Tensor) -> Tensor:
        """Return Jᵀ u `[P]` for `u` `[Z]`."""
        return self._parameters.flatten(self._vjp(tuple(self.space.split(u))))

    def gauss_newton(self, v: Tensor, h: Tensor | float) -> Tensor:
        """Return Jᵀ(h · J v) `[P]` for `v` `[P]` and a number or a diagonal `h` `[Z]`."""
        return self.vjp(self.jvp(v) * h)

    def vjps(self, u: Tensor) -> Tensor:
        """Return Jᵀ applied to each row of `u` `[K, Z]`, as `[K, P]`."""
        rows = tuple(torch.stack(t) for t in zip(*(self.space.split(row) for row in u), strict=True))
        try:
            found = vmap(self._vjp)(rows)
        except RuntimeError:  # an operation of the network cannot be vectorised; one row at a time always works
            return torch.stack([self.vjp(row) for row in u])
        return torch.cat([t.reshape(u.shape[0], -1).to(self._parameters.dtype) for t in found], 1)

    def _evaluate(self, *values: Tensor) -> tuple[Tensor, ...]:
        outputs: list[Tensor] = []
        for call, names, places in zip(self._calls, self._names, self._places, strict=True):
            state = _cloned_buffers(call.module) | {n: values[i] for n, i in names.items()}
            if call.random is not None:
                call.random.restore()
            returned = functional_call(call.module, state, call.inputs, call.keywords, tie_weights=False)
            leaves = tree_leaves(returned)
            outputs += [leaves[i] for i in places]
        return tuple(outputs)

    @contextlib.contextmanager
    def _world(self) -> Generator[None]:
        now = RandomState.capture(self._parameters.device)
        if self._calls[0].random is not None:
            self._calls[0].random.restore()
        try:
            with twice_differentiable():
                yield
        finally:
            now.restore()

    @contextlib.contextmanager
    def _forward_mode(self) -> Generator[Any]:
        with self._world(), warnings.catch_warnings():
            # the first forward-mode call of a process scripts some decompositions with torch.jit, which is deprecated
            warnings.filterwarnings("ignore", message=".*torch.jit.*", category=Warning)
            # torch.func.linearize hands its constants to a graph module in a way that the latter warns of
            warnings.filterwarnings("ignore", message="Attempted to insert a get_attr Node", category=UserWarning)
            yield


def _names(module: nn.Module, parameters: ParameterVector) -> dict[str, int]:
    """Return the number of each of the parameters by its names in `module`.

    A tied parameter has a name in every module that holds it. A module that stands in two places gets one name only:
    given two, `functional_call` would swap the parameter twice, and leave a plain tensor in the module.
    """
    return {
        f"{prefix}.{name}".lstrip("."): parameters.index_of(p)
        for prefix, part in module.named_modules()
        for name, p in part._parameters.items()
        if p is not None and p in parameters
    }


def _cloned_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Return copies of the buffers: BatchNorm in train mode writes into its own, which must stay the user's."""
    clones: dict[int, Tensor] = {}
    return {
        f"{prefix}.{name}".lstrip("."): clones.setdefault(id(b), b.clone())
        for prefix, part in module.named_modules()
        for name, b in part._buffers.items()
        if b is not None
    }
