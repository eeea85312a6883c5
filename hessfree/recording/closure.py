"""Run a closure once, keep its graph, and run it again later in exactly the same world.

The closure is the one that `torch.optim.LBFGS` takes. Its call of `Tensor.backward` is intercepted, not
replaced: backward runs and fills `p.grad` as always, and the loss keeps its graph.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from hessfree.distributed import silent
from hessfree.recording.autocast import Autocast, autocast_as, autocast_now
from hessfree.recording.calls import CallTree
from hessfree.recording.checks import (
    check_gradients_untouched,
    check_returned,
    check_unscaled,
    gradient_versions,
)
from hessfree.recording.random_state import GeneratorStates, RandomState
from hessfree.recording.tail import leaves_of
from hessfree.recording.trace import Trace, collect_marks
from hessfree.recording.twice import twice_differentiable
from hessfree.recording.world import World
from hessfree.vectors import ParameterVector

Closure = Callable[[], Any]


@dataclasses.dataclass(eq=False)
class Recording(Trace):
    """One run of a closure.

    Attributes:
        loss: The recorded loss: the sum of gradientᵢ · lossᵢ over the intercepted backward calls; a
            scalar with its graph.
        roots: The outermost calls of modules that own parameters.
        marks: What `mark_outputs` was given.
        buffers: The buffers of the modules called, as they were before the closure ran.
        returned: What the closure returned, without its graph.
        gradient: `[P]`, the gradient of `loss` alone: `p.grad` after the intercepted backward calls
            minus `p.grad` before them, whatever the closure did to `p.grad` later.
        accumulated: Whether `p.grad` held something before the first backward call.
        backwards: How many times the closure called backward.
        differentiated: Whether the closure called `torch.autograd.grad`, or else needs a graph to run.
        before: The world before the closure ran.
        after: The world after it ran.
        autocast: Whether it was called under autocast.
        wrappers: The DistributedDataParallel modules called.
        value: The loss as a number; the mean over ranks, once they have shared it.
    """

    returned: Any
    gradient: Tensor
    accumulated: bool
    backwards: int
    differentiated: bool
    before: World
    after: World
    autocast: Autocast
    wrappers: list[nn.Module]
    value: float

    @functools.cached_property
    def leaves(self) -> list[Tensor]:
        """Every leaf tensor whose gradient the backward pass of `loss` fills."""
        return leaves_of(self.loss)

    def release(self) -> None:
        """Let the graph be freed, with the inputs and outputs of the calls: nobody differentiates any more.

        Loss and calls stay, as numbers and as modules.
        """
        assert self.leaves is not None  # looked up while there is a graph
        self.loss = self.loss.detach()
        self.marks.clear()
        for root in self.roots:
            for call in root.walk():
                call.inputs, call.keywords, call.outputs = (), {}, ()


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


class _Gradients:
    """Takes the place of the closure's backward calls: passes them on, and keeps the losses and their gradient."""

    def __init__(self, parameters: ParameterVector, tree: CallTree, before_backward: Callable[[], None]) -> None:
        self.before_backward = before_backward
        self.losses: list[Tensor] = []
        self.before: list[Tensor | None] = []
        self.total: Tensor | None = None
        self._parameters = parameters
        self._tree = tree

    def on_backward(self, loss: Tensor, backward: Callable[..., None], kwargs: dict[str, Any]) -> None:
        if kwargs.get("inputs") is not None:
            raise RuntimeError(
                "the closure called backward(inputs=...), which leaves out gradients that a step needs; "
                "call loss.backward() without inputs"
            )
        if not self.losses:
            self.before = [None if p.grad is None else p.grad.detach().clone() for p in self._parameters.params]
        self.losses.append(_scaled(loss, kwargs.get("gradient")))
        self.before_backward()
        self._tree.paused = True
        try:
            backward(loss, **{**kwargs, "retain_graph": True})
        finally:
            self._tree.paused = False
        self._refuse_sparse()
        self.total = None
        self.total = self._parameters.gradients()

    def recorded(self) -> Tensor:
        """Return the gradient of the recorded loss `[P]`."""
        assert self.total is not None
        return self.total - self._parameters.flatten(self.before) if self.accumulated() else self.total

    def accumulated(self) -> bool:
        return any(g is not None for g in self.before)

    def loss(self) -> Tensor:
        return self.losses[0] if len(self.losses) == 1 else torch.stack(self.losses).sum()

    def _refuse_sparse(self) -> None:
        for p in self._parameters.params:
            if p.grad is not None and p.grad.layout != torch.strided:
                raise RuntimeError(
                    f"the gradient of a parameter of shape {tuple(p.shape)} is sparse ({p.grad.layout}), and a flat "
                    "vector is dense; build the layer with sparse=False, or give that parameter to another optimizer"
                )


def record(
    closure: Closure,
    parameters: ParameterVector,
    tree: CallTree,
    stale: bool = False,
    before_backward: Callable[[], None] = lambda: None,
) -> Recording:
    """Run `closure` once and keep its loss with its graph.

    Args:
        closure: As for `torch.optim.LBFGS`; one that only returns a loss with a graph is fine too:
            backward is then done for it.
        parameters: The parameters to differentiate with respect to.
        tree: Records the module calls; entered here.
        stale: Whether `p.grad` is left from an earlier step. A closure that only returns a loss does not clear
            it, and it is cleared for it.
        before_backward: Called before each backward pass.

    Returns:
        The recording. `p.grad` is as the closure left it. Where the closure raises, random generators and
        buffers are put back.
    """
    gradients = _Gradients(parameters, tree, before_backward)
    mode = _Interceptor(gradients.on_backward)
    before = World(RandomState.capture(parameters.device), mode.generators, tree.buffers)
    seen = gradient_versions(parameters.params)
    try:
        with torch.enable_grad(), twice_differentiable():
            with collect_marks() as marks, mode, tree:
                returned = closure()
            check_returned(returned, bool(gradients.losses), mode.differentiated)
            if not gradients.losses:
                check_gradients_untouched(parameters.params, seen)
                if stale:
                    for p in parameters.params:
                        p.grad = None
                gradients.on_backward(returned, torch.Tensor.backward, {})
            elif len(gradients.losses) == 1:
                check_unscaled(gradients.losses[0], returned)
            loss = gradients.loss()
            return Recording(
                loss=loss.clone(),  # a mean may live in the memory of what it was taken of
                roots=tree.roots,
                marks=marks,
                buffers=tree.buffers,
                returned=returned.detach().clone(),
                gradient=gradients.recorded(),
                accumulated=gradients.accumulated(),
                backwards=len(gradients.losses),
                differentiated=bool(mode.differentiated),
                before=before,
                after=before.now(parameters.device),
                autocast=autocast_now(parameters.device),
                wrappers=tree.wrappers,
                value=float(loss.detach()),
            )
    except BaseException:
        before.restore()
        raise


def replay(closure: Closure, recording: Recording, parameters: ParameterVector) -> float:
    """Run `closure` again in the world of `recording`, without backward.

    Random numbers and buffers start as they did; afterwards they stand where the recording left them, and
    every `p.grad` where it stood before the replay.

    Args:
        closure: The closure of the recording.
        recording: Its first run.
        parameters: The parameters; they may hold trial values.

    Returns:
        The recorded loss at the present values of the parameters.

    Raises:
        RuntimeError: The closure raised it, and did so again when it was given a graph.
    """
    stash = [p.grad for p in parameters.params]
    others = [(p, p.grad) for p in recording.leaves if p not in parameters]
    # a graph that saved a buffer must stay legal, whatever the forward pass does to it
    with recording.before.buffers.versions_kept(), twice_differentiable(), silent(recording.wrappers):
        try:
            for p, g in others:  # another optimizer's: the closure may clear or clip them, but only a copy
                p.grad = None if g is None else g.clone()
            try:
                losses = _rerun(closure, recording, parameters, stash)
            except RuntimeError:
                if recording.differentiated:
                    raise
                # the closure needs a graph for something else than backward: a tensor's hook, a check of its own
                recording.differentiated = True
                losses = _rerun(closure, recording, parameters, stash)
        finally:
            for p, g in (*zip(parameters.params, stash, strict=True), *others):
                p.grad = g
            recording.after.restore()
    return float(torch.stack(losses).sum())


def _rerun(
    closure: Closure, recording: Recording, parameters: ParameterVector, stash: Sequence[Tensor | None]
) -> list[Tensor]:
    losses: list[Tensor] = []

    def on_backward(loss: Tensor, backward: Callable[..., None], kwargs: dict[str, Any]) -> None:
        losses.append(_scaled(loss.detach(), kwargs.get("gradient")))
        for p, g in zip(parameters.params, stash, strict=True):
            if p.grad is None and g is not None:  # the closure may go on to clip or log gradients
                p.grad = g.clone()

    recording.before.restore()
    for p in parameters.params:
        p.grad = None
    # a closure that differentiates inside (a physics-informed residual) needs its graph again
    autocast = autocast_as(recording.autocast, parameters.device)
    with torch.set_grad_enabled(recording.differentiated), _Interceptor(on_backward), autocast:
        returned = closure()
    return losses or [returned.detach().reshape(())]


def _scaled(tensor: Tensor, gradient: Tensor | None) -> Tensor:
    """Return the scalar whose plain backward is `tensor.backward(gradient)`."""
    if gradient is not None:
        return (tensor * gradient.detach()).sum()
    # of several numbers backward itself says what is wrong
    return tensor if tensor.ndim == 0 or tensor.numel() != 1 else tensor.reshape(())
