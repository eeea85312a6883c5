"""The tree of calls of the modules that own our parameters, recorded while a closure runs."""

from __future__ import annotations

import dataclasses
import functools
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves

from hessfree.distributed import world
from hessfree.recording.autocast import Autocast, autocast_now
from hessfree.recording.buffers import BufferStates
from hessfree.recording.random_state import RandomState
from hessfree.vectors import FlatSpace, ParameterVector


@dataclasses.dataclass(frozen=True, eq=False)
class Output:
    """One tensor that a call returned, as it was when the call returned it.

    The gradient edge is taken at that moment, so that an in-place operation on the tensor later (a
    mask, an in-place activation) does not move it.

    Attributes:
        edge: Where the tensor stands in the autograd graph.
        shape: Its shape.
        dtype: Its dtype.
        device: Its device.
        value: The tensor, detached; it shares memory with what the closure went on to use. None where
            keeping it would keep memory alive that nothing else needs.
        leaf: Its place among the leaves of what was returned, differentiable or not.
        version: How often it had been written into.
    """

    edge: GradientEdge
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    value: Tensor | None
    leaf: int = 0
    version: int = 0

    @property
    def intact(self) -> bool:
        """Whether the value is known, and is still what the call returned: nobody wrote into it in place."""
        return self.value is not None and self.value._version == self.version

    @functools.cached_property
    def largest(self) -> Tensor:
        """The largest absolute number in the value, which is known and not empty."""
        assert self.value is not None
        return self.value.abs().max()

    @classmethod
    def all_of(cls, returned: Any, keep_value: bool = True) -> tuple[Output, ...]:
        """Describe the differentiable tensors in `returned`.

        Args:
            returned: Any nesting of tuples, lists and dicts.
            keep_value: Whether to keep the values.

        Returns:
            One output for each tensor with a graph, in pytree order. Leaves of the graph (a parameter returned
            as it is) have no Jacobian of their own and are left out; so are complex and nested tensors, which
            flat real vectors do not describe.
        """
        return tuple(
            cls(get_gradient_edge(t), t.shape, t.dtype, t.device, t.detach() if keep_value else None, i, t._version)
            for i, t in enumerate(tree_leaves(returned))
            if isinstance(t, Tensor)
            and t.grad_fn is not None
            and t.is_floating_point()
            and t.layout == torch.strided
            and not t.is_nested
        )


def space_of(outputs: Sequence[Output]) -> FlatSpace:
    """Return the flat space `[Z]` of some outputs, at least one."""
    return FlatSpace([o.shape for o in outputs], [o.dtype for o in outputs], outputs[0].device)


@dataclasses.dataclass(eq=False)
class Call:
    """One call of a module that owns at least one of the parameters.

    Attributes:
        module: The module.
        inputs: Its positional arguments.
        keywords: Its keyword arguments.
        outputs: The differentiable tensors among what it returned, in pytree order.
        children: The calls that it made, in order.
        path: Its place in the tree: the index of each call on the way down from the outermost.
        random: Random state before the call; recorded for outermost calls and on request.
    """

    module: nn.Module
    inputs: tuple[Any, ...]
    keywords: dict[str, Any] = dataclasses.field(default_factory=dict)
    outputs: tuple[Output, ...] = ()
    children: list[Call] = dataclasses.field(default_factory=list)
    path: tuple[int, ...] = ()
    random: RandomState | None = None
    autocast: Autocast = ()

    def walk(self) -> Iterator[Call]:
        """Yield this call and all below it, in the order in which they began.

        Yields:
            Each call.
        """
        yield self
        for child in self.children:
            yield from child.walk()

    def signature(self) -> tuple[Any, ...]:
        """Return what stays the same as long as the same modules call each other in the same way."""
        return (id(self.module), len(self.outputs), tuple(child.signature() for child in self.children))


class Owners:
    """Which modules own at least one of a set of parameters; remembered, since it is asked at every call."""

    def __init__(self, parameters: ParameterVector) -> None:
        """Ask about `parameters`."""
        self._parameters = parameters
        self._known: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()

    def __contains__(self, module: object) -> bool:
        """Tell whether `module` or a part of it holds one of the parameters."""
        assert isinstance(module, nn.Module)
        known = self._known.get(module)
        if known is None:
            known = any(p in self._parameters for p in module.parameters())
            self._known[module] = known
        return known


class CallTree:
    """Records calls while it is entered, through global module hooks that are gone when it is left.

    Attributes:
        roots: The outermost calls.
        buffers: The buffers of every module called, as they were before its first call.
        wrappers: The DistributedDataParallel modules called. In their place stand the modules that they wrap.
        before_wrapper: Called before each call of one.
        paused: While true nothing is recorded (a checkpoint recomputes modules inside backward).
    """

    def __init__(
        self,
        owners: Owners,
        device: torch.device,
        keep_inputs: Callable[[nn.Module], bool],
        keep_value: Callable[[tuple[int, ...]], bool],
    ) -> None:
        """Prepare to record.

        Args:
            owners: The modules to record.
            device: Whose random state to take down before an outermost call.
            keep_inputs: For which inner modules to keep the arguments; outermost calls keep theirs.
            keep_value: At which paths of the tree to keep the values of the outputs.
        """
        self.roots: list[Call] = []
        self.buffers = BufferStates()
        self.wrappers: list[nn.Module] = []
        self.before_wrapper: Callable[[], None] = lambda: None
        self.paused = False
        self._owners = owners
        self._device = device
        self._keep_inputs = keep_inputs
        self._keep_value = keep_value
        self._stack: list[Call] = []
        self._handles: list[Any] = []
        self._thread = 0
        self._forward: Any = None  # what stood in for `forward` of the outermost module when it was called

    def __enter__(self) -> CallTree:
        """Begin to record what this thread calls."""
        self._thread = threading.get_ident()
        self._handles = [
            register_module_forward_pre_hook(self._before),
            register_module_forward_hook(self._after, with_kwargs=True, always_call=True),
        ]
        return self

    def __exit__(self, *_: object) -> None:
        """Stop recording."""
        for handle in self._handles:
            handle.remove()
            # torch forgets to drop this entry of a global hook, and the dict would grow by one a step
            getattr(nn.modules.module, "_global_forward_hooks_with_kwargs", {}).pop(handle.id, None)

    def _before(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self.paused or threading.get_ident() != self._thread:
            return
        _refuse_spread(module)
        if isinstance(module, DistributedDataParallel):  # it may hand buffers round before it calls its module
            if module in self._owners:
                if module not in self.wrappers:
                    self.wrappers.append(module)
                self.before_wrapper()
            return
        self.buffers.see(module)
        if module not in self._owners:
            return
        self._drop_redirected()
        outermost = not self._stack
        siblings = self.roots if outermost else self._stack[-1].children
        path = (() if outermost else self._stack[-1].path) + (len(siblings),)
        call = Call(module, args if outermost or self._keep_inputs(module) else (), path=path)
        if outermost:
            self._forward = vars(module).get("forward")
            call.random = RandomState.capture(self._device)
            call.autocast = autocast_now(self._device)
        siblings.append(call)
        self._stack.append(call)

    def _drop_redirected(self) -> None:
        """Forget an outermost call that its module's own `forward` did not answer.

        Lightning leads `training_step` through the forward pass of DistributedDataParallel: it puts a function in the
        place of `forward` that takes itself away when it begins. To call the module again would be another thing.
        """
        if len(self._stack) == 1 and vars(self._stack[0].module).get("forward") is not self._forward:
            self._stack.clear()
            self.roots.pop()

    def _after(self, module: nn.Module, args: tuple[Any, ...], *kwargs_and_output: Any) -> None:
        # torch passes no kwargs where the forward raised and the hook runs only because of always_call
        if self.paused or threading.get_ident() != self._thread or module not in self._owners:
            return
        if not self._stack or self._stack[-1].module is not module:
            return  # a wrapper, or a call that was refused before it began
        call = self._stack.pop()
        if call.inputs or not self._stack:
            call.keywords = kwargs_and_output[0] if len(kwargs_and_output) == 2 else {}
        call.outputs = Output.all_of(kwargs_and_output[-1], self._keep_value(call.path))


def _refuse_spread(module: nn.Module) -> None:
    """Refuse modules whose parameters or samples are spread over ranks in a way that has no products.

    `fully_shard` gathers parameters for the forward pass only. What runs there are copies: autograd gives None for
    derivatives in the parameters themselves, and forward mode has no rule for the shards (torch 2.14). The statistics
    of SyncBatchNorm make outputs of one rank depend on samples of another, and its backward is no differentiable code.

    Args:
        module: About to be called.

    Raises:
        RuntimeError: It is such a module.
    """
    if isinstance(module, nn.SyncBatchNorm) and module.training and world() > 1:
        raise RuntimeError(
            f"SyncBatchNorm mixes samples of {world()} ranks, and each rank makes its products with the Jacobian from "
            "its own; use BatchNorm, whose statistics are a rank's own, or GroupNorm or LayerNorm, which need none"
        )
    fsdp = sys.modules.get("torch.distributed.fsdp")  # where nobody imported it, there are none
    if fsdp is not None and isinstance(module, (fsdp.FSDPModule, fsdp.FullyShardedDataParallel)):
        raise RuntimeError(
            f"{type(module).__name__} shards its parameters (fully_shard, FSDP), and torch differentiates them neither "
            "twice nor in forward mode, which products with the Jacobian need. Use DistributedDataParallel, with "
            "shard_vectors=True to divide the optimizer's vectors; or tensor parallelism (parallelize_module)"
        )
