"""Record a network together with both products of its Jacobian, as one graph of aten operators."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from hessfree.linearization.traced.network import Network
from hessfree.linearization.traced.nodes import mutates
from hessfree.linearization.traced.saved import SavedState, read_saved
from hessfree.recording import RandomState, autocast_as, twice_differentiable
from hessfree.vectors import FlatSpace, ParameterVector


class Joint:
    """(parameters, state, inputs, v, u) -> (z, saved, J v, Jᵀ u) from one evaluation of a network.

    Jᵀu is what autograd makes of the evaluation, and J v the derivative of u -> Jᵀu applied to v (the
    double backward trick): whatever autograd differentiates twice is served, and every random draw is one for
    z, J and Jᵀ alike. Written out as operators, this J v is the one of forward mode. The saved tensors are those
    that autograd kept for Jᵀu, by their places in its graph.

    Attributes:
        structure: That of the autograd graph; None where no saved tensors are among the results.
        literals: Places of saved tensors that are not among them: numbers in the code of the network.
    """

    def __init__(
        self, network: Network, parameters: ParameterVector, space: FlatSpace, structure: tuple[Any, ...] | None
    ) -> None:
        """Take the network, its parameters, the flat space of its outputs and the structure of its autograd graph."""
        self.structure = structure
        self.literals: list[int] = []
        self._network = network
        self._parameters = parameters
        self._space = space
        counts = [len(parameters.params), len(network.state), len(network.inputs)]
        self._ends = [sum(counts[: i + 1]) for i in range(3)]

    def examples(self) -> list[Tensor]:
        """Return present values of all arguments, each a tensor object of its own."""
        parameters, space = self._parameters, self._space
        known = [t.detach() for t in (*parameters.params, *self._network.state, *self._network.inputs)]
        v = torch.ones(parameters.size, dtype=parameters.dtype, device=parameters.device)
        return [*known, v, torch.ones(space.size, dtype=space.dtype, device=space.device)]

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Evaluate the function."""
        params, state, inputs = self._split(tensors)
        leaves = [p.detach().requires_grad_() for p in params]

        def differentiate() -> tuple[Tensor, ...]:
            z = self._network.outputs(inputs)
            saved = self._saved(z, leaves)
            return *(t.detach() for t in z), *saved, *self._products(z, leaves, *tensors[-2:])

        with torch.enable_grad():
            return self._network.within(leaves, state, differentiate)

    def _saved(self, z: Sequence[Tensor], leaves: Sequence[Tensor]) -> tuple[Tensor, ...]:
        if self.structure is None:
            return ()
        found = saved_state(z, leaves)
        if found is None or found.structure != self.structure:
            self.structure = None
            return ()
        results = []
        for place, tensor in enumerate(found.tensors):
            try:
                results.append(tensor.detach())
            except RuntimeError:  # tracing sees a Python number in it
                self.literals.append(place)
        return tuple(results)

    def _split(self, tensors: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]]:
        first, second, third = self._ends
        return tensors[:first], tensors[first:second], tensors[second:third]

    def _products(self, z: list[Tensor], leaves: list[Tensor], v: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        cotangents = [t.detach().requires_grad_() for t in self._space.split(u)]
        pullback = torch.autograd.grad(z, leaves, cotangents, create_graph=True, allow_unused=True)
        reached = [
            (t, w)
            for t, w in zip(pullback, self._parameters.split(v), strict=True)
            if t is not None and t.requires_grad
        ]
        pushforward: Sequence[Tensor | None] = [None] * len(z)
        if reached:
            pushforward = torch.autograd.grad(
                [t for t, _ in reached], cotangents, [w for _, w in reached], allow_unused=True
            )
        return self._space.flatten(pushforward), self._parameters.flatten(pullback)


def saved_state(z: Sequence[Tensor], leaves: Sequence[Tensor]) -> SavedState | None:
    """Return what autograd saved for outputs that `Network.outputs` returned.

    Args:
        z: The outputs, each the clone of what a call returned.
        leaves: The parameters.

    Returns:
        The state, or None.
    """
    if any(t.grad_fn is None for t in z):
        return None
    edges = [t.grad_fn.next_functions[0] for t in z if t.grad_fn is not None]
    return read_saved(edges, {id(leaf): i for i, leaf in enumerate(leaves)})


def capture(joint: Joint) -> fx.GraphModule:
    """Record `joint` as a functional graph, in which no operator writes into anything.

    Args:
        joint: What to record.

    Returns:
        The graph, with the arguments of `joint` as placeholders.
    """
    # semi-private, hence not imported before they are needed: whatever fails here, the autograd graph remains
    from torch._guards import TracingContext, tracing
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.func import functionalize
    from torch.fx.experimental.proxy_tensor import make_fx

    examples = joint.examples()
    # make_fx notes the shape of each value as a fake tensor; without a mode to share it builds one a value, which
    # records the stack each time and takes half of the whole trace; the mode is this thread's, and so must the backward
    # pass be, which an accelerator has a thread for
    shared = tracing(TracingContext(FakeTensorMode(allow_fallback_kernels=True)))
    with shared, torch.autograd.set_multithreading_enabled(False):
        recorded = make_fx(joint)(*examples)
        if any(mutates(node) for node in recorded.graph.nodes):
            recorded = make_fx(functionalize(recorded, remove="mutations"))(*examples)
    return recorded


def first_line(error: BaseException) -> str:
    """Return what `error` says, short."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


@contextlib.contextmanager
def plain_world(network: Network, device: torch.device) -> Generator[None]:
    """Evaluate as the closure did, in the precision asked for and by operators that can be differentiated.

    Random state is put back when left.

    Args:
        network: Whose random state to begin with.
        device: Where the parameters live.

    Yields:
        Nothing.
    """
    now = RandomState.capture(device)
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        if network.random is not None:
            network.random.restore()
        torch.backends.mha.set_fastpath_enabled(False)
        with twice_differentiable(), autocast_as(network.autocast, device):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        now.restore()
