"""The recorded call of a module as a function of tensors: parameters, other state, inputs."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import enum
from collections.abc import Callable, Generator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from hessfree.linearization.base import LinearizationError
from hessfree.linearization.traced.surroundings import structure
from hessfree.recording import Autocast, Call, Output
from hessfree.vectors import ParameterVector

T = TypeVar("T")
Arguments = tuple[tuple[Any, ...], dict[str, Any]]
PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size, enum.Enum, slice)


@dataclasses.dataclass(frozen=True)
class Place:
    """Where one output z is returned: by which call of which module, and where in what that call returned.

    Attributes:
        module: The module.
        occurrence: How many times it was called before, within the outermost call.
        leaf: The place among the leaves of what it returned.
    """

    module: nn.Module
    occurrence: int
    leaf: int


class Network:
    """A recorded outermost call, ready to be evaluated again with other tensors.

    Attributes:
        module: The module called.
        places: Where each output is.
        random: Random state before the call, if it was taken down.
        inputs: The tensors among the arguments, without graph.
        spec: How the arguments are nested.
        leaves: The leaves of the arguments; None where a tensor stands.
        parts: The module and all modules in it.
        params: Index of the parameter behind each name that the module knows it by.
        constants: Index, in `state`, of every other tensor of the module, by name.
        state: Buffers and the parameters that are not ours, each once.
        autocast: What autocast it is to be evaluated under.
        structure: The form of the recorded autograd graph.
        custom: Whether custom Functions are in it.
    """

    def __init__(
        self,
        root: Call,
        outputs: Sequence[Output],
        parameters: ParameterVector,
        arguments: Arguments | None = None,
        autocast: Autocast = (),
    ) -> None:
        """Describe the call.

        Args:
            root: An outermost call.
            outputs: z: outputs of this call or of calls that it made.
            parameters: The parameters.
            arguments: Positional and keyword arguments in place of the recorded ones (a part of the batch).
            autocast: What autocast to evaluate it under.

        Raises:
            LinearizationError: An argument depends on parameters, or is neither a plain tensor nor a plain value;
                or an output is not one of this call.
        """
        if len(root.path) > 1 and not root.inputs and not root.keywords:
            raise LinearizationError(f"the inputs of {type(root.module).__name__} were not kept")
        self.module = unwrapped(root.module)
        self.places = _find(root, outputs)
        self.random, self.autocast = root.random, autocast
        self.structure, self.custom = structure(outputs)
        values, self.spec = tree_flatten((root.inputs, root.keywords) if arguments is None else arguments)
        self.inputs = [_input(v, root, parameters) for v in values if isinstance(v, Tensor)]
        self.leaves = tuple(None if isinstance(v, Tensor) else _plain(v, root) for v in values)
        self._tensors = [i for i, v in enumerate(values) if isinstance(v, Tensor)]
        self.parts: list[nn.Module] = []
        self.params: dict[str, int] = {}
        self.constants: dict[str, int] = {}
        self.state: list[Tensor] = []
        self._list_state(parameters)

    def within(self, params: Sequence[Tensor], state: Sequence[Tensor], run: Callable[[], T]) -> T:
        """Call `run` while other tensors stand in for the module's own.

        Args:
            params: One for each parameter.
            state: One for each entry of `state`; cloned, so that running statistics stay the user's.
            run: What to call. It may differentiate: what a checkpoint recomputes sees the same tensors.

        Returns:
            What `run` returned.
        """
        clones = [t.clone() for t in state]
        named = {f"module.{n}": params[i] for n, i in self.params.items()}
        named |= {f"module.{n}": clones[i] for n, i in self.constants.items()}
        with _attributes_kept(self.module):
            return functional_call(_Scope(self.module), named, (run,), tie_weights=False)  # every name is there

    def outputs(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Call the module with other inputs, and stop as soon as every output is known.

        Args:
            inputs: One for each entry of `self.inputs`.

        Returns:
            The outputs z, as they were when their calls returned them.

        Raises:
            LinearizationError: The calls that gave the outputs did not happen.
        """
        leaves = list(self.leaves)
        for i, t in zip(self._tensors, inputs, strict=True):
            leaves[i] = t
        arguments, keywords = tree_unflatten(leaves, self.spec)
        found: dict[Place, Tensor] = {}
        with contextlib.suppress(_Complete), _collected(set(self.places), found):
            self.module(*arguments, **keywords)
        if len(found) < len(set(self.places)):
            raise LinearizationError(f"{type(self.module).__name__} called other modules than it did before")
        return [found[place] for place in self.places]

    def _list_state(self, parameters: ParameterVector) -> None:
        known: dict[int, int] = {}
        # a module that stands twice has its tensors under one name: given both, functional_call would swap them twice
        # and leave plain tensors in the place of the parameters
        seen: set[nn.Module] = set()
        for prefix, part in self.module.named_modules(remove_duplicate=False):
            self.parts.append(part)
            if part in seen:
                continue
            seen.add(part)
            for name, tensor in (*part._parameters.items(), *part._buffers.items()):
                if tensor is None:
                    continue
                full = f"{prefix}.{name}" if prefix else name
                if tensor in parameters:
                    self.params[full] = parameters.index_of(tensor)
                    continue
                if id(tensor) not in known:
                    known[id(tensor)] = len(self.state)
                    self.state.append(tensor.detach())
                self.constants[full] = known[id(tensor)]


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the network inside the wrappers of DistributedDataParallel and torch.compile.

    The first one's forward prepares a reduction of gradients that a second evaluation must not disturb.

    Args:
        module: A module.

    Returns:
        The module that it hands its arguments to, or itself.
    """
    while True:
        inner = module._modules.get("module") if isinstance(module, nn.parallel.DistributedDataParallel) else None
        inner = inner or module._modules.get("_orig_mod")
        if inner is None:
            return module
        module = inner


class _Scope(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, run: Callable[[], Any]) -> Any:
        return run()


class _Complete(BaseException):
    """Every output is known; a loss that the module computes of them need not be evaluated."""


@contextlib.contextmanager
def _collected(places: set[Place], found: dict[Place, Tensor]) -> Generator[None]:
    """Put the outputs at `places` into `found`, through global module hooks like those that recorded them."""
    modules = {place.module for place in places}
    counts: collections.Counter[nn.Module] = collections.Counter()
    running: list[tuple[nn.Module, int]] = []

    def before(module: nn.Module, args: Any) -> None:
        if module in modules:
            running.append((module, counts[module]))
            counts[module] += 1

    def after(module: nn.Module, args: Any, returned: Any) -> None:
        if module not in modules:
            return
        _, occurrence = running.pop()
        leaves = tree_leaves(returned)
        for place in places:
            if (place.module, place.occurrence) == (module, occurrence):
                found[place] = leaves[place.leaf].clone()  # the caller may write into it
        if len(found) == len(places):
            raise _Complete

    handles = [register_module_forward_pre_hook(before), register_module_forward_hook(after)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _attributes_kept(module: nn.Module) -> Generator[None]:
    """Put back the attributes that modules assign to themselves (a counter, an activation kept to look at)."""
    kept = [(part.__dict__, dict(part.__dict__)) for part in module.modules()]
    try:
        yield
    finally:
        for attributes, before in kept:
            for name in attributes.keys() - before.keys():
                del attributes[name]
            attributes.update(before)


def _find(root: Call, outputs: Sequence[Output]) -> tuple[Place, ...]:
    counts: collections.Counter[int] = collections.Counter()
    places: dict[int, Place] = {}
    for call in root.walk():
        for output in call.outputs:
            places[id(output)] = Place(unwrapped(call.module), counts[id(call.module)], output.leaf)
        counts[id(call.module)] += 1
    if any(id(output) not in places for output in outputs):
        raise LinearizationError("the outputs were marked, or come from several calls")
    return tuple(places[id(output)] for output in outputs)


def refuse_dependent_inputs(root: Call, parameters: ParameterVector) -> None:
    """Raise a LinearizationError where an argument of the call `root` depends on parameters."""
    for leaf in tree_leaves((root.inputs, root.keywords)):
        if isinstance(leaf, Tensor):
            _input(leaf, root, parameters)


def _input(tensor: Tensor, root: Call, parameters: ParameterVector) -> Tensor:
    name = type(root.module).__name__
    if tensor.grad_fn is not None or tensor in parameters:
        raise LinearizationError(f"the inputs of {name} may depend on parameters")
    if type(tensor) not in {Tensor, nn.Parameter} or tensor.layout != torch.strided:
        raise LinearizationError(f"an input of {name} is a {type(tensor).__name__} of layout {tensor.layout}")
    return tensor.detach()


def _plain(value: Any, root: Call) -> Any:
    if not isinstance(value, PLAIN):
        name = type(root.module).__name__
        raise LinearizationError(f"an input of {name} is a {type(value).__name__}, neither tensor nor plain value")
    return value
