"""Run a closure once, keep its graph, and run it again later in exactly the same world.

The closure is the one that `torch.optim.LBFGS` takes. Its call of `Tensor.backward` is intercepted, not
replaced: backward runs and fills `p.grad` as always, and the loss keeps its graph.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from hessfree.recording.calls import Call, CallTree, Output
from hessfree.recording.random_state import GeneratorStates, RandomState
from hessfree.vectors import ParameterVector

Closure = Callable[[], Any]

_marking: list[list[Output]] = []


def mark_outputs(outputs: Any) -> Any:
    """Say that the Gauss-Newton cut is here: the network ends and the loss begins at `outputs`.

    The curvature is then JᵀHJ with J the Jacobian of `outputs` in the parameters and H the Hessian of
    the loss in `outputs`. Needed only where no module returns them: the residual of a differential
    equation, a model that returns its own loss. Several calls in one closure mark several outputs.

    Args:
        outputs: A tensor, or any nesting of tuples, lists and dicts of tensors.

    Returns:
        `outputs`, unchanged. Outside a closure that `HessianFree.step` runs, nothing else happens.
    """
    if _marking:
        _marking[-1].extend(Output.all_of(outputs))
    return outputs


@dataclasses.dataclass(eq=False)
class Recording:
    """One run of a closure.

    Attributes:
        returned: What the closure returned.
        loss: The recorded loss: the sum of gradientᵢ · lossᵢ over the intercepted backward calls; a
            scalar with its graph.
        roots: The outermost calls of modules that own parameters.
        marks: What `mark_outputs` was given.
        gradient: `[P]`, the gradient of `loss` alone: `p.grad` after the intercepted backward calls
            minus `p.grad` before them, whatever the closure did to `p.grad` later.
        accumulated: Whether `p.grad` held something before the first backward call.
        backwards: How many times the closure called backward.
        differentiated: Whether the closure called `torch.autograd.grad`.
        before: The world before the closure ran.
        after: The world after it ran; None until the first replay.
    """

    returned: Any
    loss: Tensor
    roots: list[Call]
    marks: list[Output]
    gradient: Tensor
    accumulated: bool
    backwards: int
    differentiated: bool
    before: World
    after: World | None = None

    def signature(self) -> tuple[Any, ...]:
        """Return what stays the same as long as the closure calls the same modules in the same way."""
        return (len(self.marks), tuple(call.signature() for call in self.roots))


@dataclasses.dataclass(frozen=True, eq=False)
class World:
    """Everything outside the parameters that a forward pass may change.

    Attributes:
        random: The global random generators.
        generators: The `torch.Generator` objects that the closure drew from.
        buffers: The buffers of the modules that the closure called.
    """

    random: RandomState
    generators: GeneratorStates
    buffers: Any

    def now(self, device: torch.device) -> World:
        """Return the same things as they are now."""
        return World(RandomState.capture(device), self.generators.now(), self.buffers.now())

    def restore(self) -> None:
        """Put everything back."""
        self.random.restore()
        self.generators.restore()
        self.buffers.restore()


class _Interceptor(TorchFunctionMode):
    """Sees every torch function of a closure; holds on to what its backward calls were given."""

    def __init__(self, on_backward: Callable[[Tensor, Callable[..., None], dict[str, Any]], None]) -> None:
        super().__init__()
        self.on_backward = on_backward
        self.generators = GeneratorStates()
        self.differentiated: list[Tensor] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if not kwargs:
            return func(*args)
        if func is torch.Tensor.backward:
            return self.on_backward(args[0], func, kwargs)
        if func is torch.autograd.backward:
            raise RuntimeError(
                "the closure called torch.autograd.backward, which HessianFree cannot follow; "
                "call loss.backward() instead"
            )
        if func is torch.autograd.grad:
            self.differentiated.extend(t for t in tree_leaves(args[0]) if isinstance(t, Tensor))
        generator = kwargs.get("generator")
        if generator is not None:
            self.generators.see(generator)
        return func(*args, **kwargs)


def scaled_loss(tensor: Tensor, gradient: Tensor | None) -> Tensor:
    """Return the scalar whose plain backward is `tensor.backward(gradient)`."""
    if gradient is None:
        return tensor
    return (tensor * gradient).sum()


@contextlib.contextmanager
def twice_differentiable() -> Iterator[None]:
    """Make every forward pass inside differentiable twice.

    Fused attention has neither forward mode nor double backward, and compiled modules no double
    backward: their plain forms are exact, and enough.

    Yields:
        Nothing.
    """
    with sdpa_kernel(SDPBackend.MATH):
        if "torch._dynamo" in sys.modules:  # importing it takes seconds, and without it nothing is compiled
            with torch.compiler.set_stance("force_eager"):
                yield
        else:
            yield


def record(closure: Closure, parameters: ParameterVector, tree: CallTree) -> Recording:
    """Run `closure` once and keep its loss with its graph.

    Args:
        closure: As for `torch.optim.LBFGS`; one that only returns a loss with a graph is fine too:
            backward is then done for it.
        parameters: The parameters to differentiate with respect to.
        tree: Records the module calls; entered here.

    Returns:
        The recording. `p.grad` is as the closure left it.

    Raises:
        TypeError: The closure returned no tensor.
        ValueError: Its loss is not a scalar.
        RuntimeError: The loss has no graph, or was differentiated in a way that cannot be followed.
    """
    losses: list[Tensor] = []
    before: list[Tensor | None] = []
    gradient: list[Tensor] = []

    def on_backward(loss: Tensor, backward: Callable[..., None], kwargs: dict[str, Any]) -> None:
        if kwargs.get("inputs") is not None:
            raise RuntimeError(
                "the closure called backward(inputs=...), which leaves out gradients that a step needs; "
                "call loss.backward() without inputs"
            )
        if not losses:
            before.extend(None if p.grad is None else p.grad.detach().clone() for p in parameters.params)
        losses.append(scaled_loss(loss, kwargs.get("gradient")))
        tree.paused = True
        try:
            backward(loss, **{**kwargs, "retain_graph": True})
        finally:
            tree.paused = False
        gradient[:] = [_recorded_gradient(parameters, before)]

    mode = _Interceptor(on_backward)
    random = RandomState.capture(parameters.device)
    marks: list[Output] = []
    _marking.append(marks)
    try:
        with torch.enable_grad(), twice_differentiable(), mode, tree:
            returned = closure()
        _check_returned(returned, bool(losses), mode.differentiated)
        if losses:
            _check_unscaled(losses, returned)
        else:
            on_backward(returned, torch.Tensor.backward, {})
    except BaseException:
        World(random, mode.generators, tree.buffers).restore()
        raise
    finally:
        _marking.pop()
    loss = losses[0] if len(losses) == 1 else torch.stack(losses).sum()
    return Recording(
        returned=returned,
        loss=loss,
        roots=tree.roots,
        marks=marks,
        gradient=gradient[0],
        accumulated=any(g is not None for g in before),
        backwards=len(losses),
        differentiated=bool(mode.differentiated),
        before=World(random, mode.generators, tree.buffers),
    )


def replay(closure: Closure, recording: Recording, parameters: ParameterVector) -> float:
    """Run `closure` again in the world of `recording`, without backward.

    Random numbers and buffers start as they did; afterwards they, and `p.grad`, stand where they
    stood before the replay.

    Args:
        closure: The closure of the recording.
        recording: Its first run.
        parameters: The parameters; they may hold trial values.

    Returns:
        The recorded loss at the present values of the parameters.
    """
    losses: list[Tensor] = []
    stash = [p.grad for p in parameters.params]

    def on_backward(loss: Tensor, backward: Callable[..., None], kwargs: dict[str, Any]) -> None:
        losses.append(scaled_loss(loss, kwargs.get("gradient")).detach())
        for p, g in zip(parameters.params, stash, strict=True):
            if p.grad is None and g is not None:  # the closure may go on to clip or log gradients
                p.grad = g.clone()

    if recording.after is None:
        recording.after = recording.before.now(parameters.device)
    recording.before.restore()
    try:
        for p in parameters.params:
            p.grad = None
        # a closure that differentiates inside (a physics-informed residual) needs its graph again
        with torch.set_grad_enabled(recording.differentiated), twice_differentiable(), _Interceptor(on_backward):
            returned = closure()
    finally:
        for p, g in zip(parameters.params, stash, strict=True):
            p.grad = g
        recording.after.restore()
    if not losses:
        losses.append(returned.detach())
    return float(torch.stack([loss.reshape(()) for loss in losses]).sum())


def _recorded_gradient(parameters: ParameterVector, before: list[Tensor | None]) -> Tensor:
    for p in parameters.params:
        if p.grad is not None and p.grad.layout != torch.strided:
            raise RuntimeError(
                f"the gradient of a parameter of shape {tuple(p.shape)} is sparse ({p.grad.layout}), and a flat vector "
                "is dense; build the layer with sparse=False, or give that parameter to another optimizer"
            )
    after = parameters.gradients()
    return after if all(b is None for b in before) else after - parameters.flatten(before)


def _check_returned(returned: Any, backward_seen: bool, differentiated: list[Tensor]) -> None:
    if not isinstance(returned, Tensor):
        raise TypeError(
            f"the closure returned {returned!r} of type {type(returned).__name__}, not a tensor; "
            "end it with `return loss`"
        )
    if returned.numel() != 1:
        raise ValueError(
            f"the closure returned a tensor of shape {tuple(returned.shape)}, not a scalar; "
            "reduce it first, for example return loss.mean()"
        )
    if backward_seen:
        return
    if any(t is returned for t in differentiated):
        raise RuntimeError(
            "the closure called torch.autograd.grad on the loss, which HessianFree cannot follow; "
            "call loss.backward() instead and leave p.grad as it fills it"
        )
    if not returned.requires_grad:
        raise RuntimeError(
            f"the closure returned a loss without a graph ({returned!r}) and never called backward(); "
            "call loss.backward() in the closure, and return the loss before detach() or item() matters"
        )


def _check_unscaled(losses: list[Tensor], returned: Tensor) -> None:
    """Refuse a loss multiplied by a GradScaler: its scale changes from step to step, and G with it."""
    node = losses[0].grad_fn
    factor = getattr(node, "_saved_other", None)
    if len(losses) > 1 or not isinstance(factor, Tensor) or factor.numel() != 1 or factor.requires_grad:
        return
    scale = float(factor)
    # a GradScaler's scale is a power of two held in a tensor, and what the closure returns is the loss without it
    if scale >= 2 and math.log2(scale).is_integer() and float(losses[0].detach()) == scale * float(returned.detach()) != 0:
        raise RuntimeError(
            f"backward was called on {scale:g} times the loss that the closure returned, as a GradScaler does; "
            "HessianFree needs the loss itself: drop the GradScaler and use bfloat16 autocast or float32"
        )
