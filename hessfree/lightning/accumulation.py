"""The micro-batches of an accumulated gradient, taken together again for one step.

A Trainer runs the closures of all micro-batches but the last outside `optimizer.step`. What it keeps of them is their
gradient; their losses, by which ρ is measured, and their curvature are gone.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from hessfree.recording import BufferStates, GeneratorStates, RandomState, unseen

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

Closure = Callable[[], Any]


class _MicroBatch(NamedTuple):
    batch: Any
    number: int
    random: RandomState  # before its training step
    generators: GeneratorStates


class Accumulation:
    """Collects micro-batches, and puts them before the closure of the step that they lead to.

    The step's closure then calls backward once for each micro-batch, which `HessianFree` takes for the sum of their
    losses: gradient, curvature and ρ are those of all, as a whole batch of their size has them. The user's hooks see
    the last of these calls alone, with all gradients in `p.grad`: one that changes gradients acts on the sum.
    """

    def __init__(self, trainer: Trainer, module: LightningModule) -> None:
        """Collect nothing yet.

        Args:
            trainer: The Trainer.
            module: What it trains.
        """
        self._trainer, self._module = trainer, module
        self._told = False
        self._present: _MicroBatch | None = None
        self._earlier: list[_MicroBatch] = []
        # whose training step takes an iterator draws its own batches, which cannot be had again
        draws = "dataloader_iter" in inspect.signature(module.training_step).parameters
        self._collects = module.automatic_optimization and not draws

    def begin(self, batch: Any, index: int) -> None:
        """Note what the next training step is given.

        Args:
            batch: On its device.
            index: Its number in the epoch.
        """
        if self._collects and self._trainer.accumulate_grad_batches > 1:
            self._tell()
            random = RandomState.capture(self._module.device)
            self._present = _MicroBatch(batch, index, random, self._generators())

    def keep(self) -> None:
        """Take it that the present micro-batch has gone into the gradient."""
        if self._present is not None:
            self._earlier.append(self._present)
        self._present = None

    def clear(self) -> None:
        """Forget what was collected, for the gradient is cleared."""
        self._earlier = []

    def together(self, closure: Closure, optimizer: Any) -> Closure | None:
        """Return a closure of all micro-batches.

        Args:
            closure: That of the last one, which has not run.
            optimizer: Whose gradients the earlier ones are in.

        Returns:
            The closure; None where there is one micro-batch only.
        """
        earlier = tuple(self._earlier)
        if not earlier:
            return None
        # as the last training step is to find them; when the closure is replayed they are where the first one began
        generators = self._generators()

        def all_of_them() -> Any:
            for p in (p for group in optimizer.param_groups for p in group["params"]):
                p.grad = None
            self._run(earlier, optimizer)
            generators.restore()
            return closure()

        return all_of_them

    def _run(self, earlier: tuple[_MicroBatch, ...], optimizer: Any) -> None:
        """Run training step and backward of each once more, unseen, and leave random numbers and buffers alone."""
        random, buffers = RandomState.capture(self._module.device), BufferStates()
        buffers.see(self._module)
        try:
            with unseen(), buffers.versions_kept(), self._unsynchronised():
                for micro in earlier:
                    micro.random.restore()
                    micro.generators.restore()
                    self._closure_of(micro, optimizer).closure()
        finally:
            buffers.restore()
            random.restore()

    def _generators(self) -> GeneratorStates:
        """Take down the generators that are attributes of the module or of its parts."""
        states = GeneratorStates()
        for part in self._module.modules():
            for value in vars(part).values():
                if isinstance(value, torch.Generator):
                    states.see(value)
        return states

    def _tell(self) -> None:
        """Say once what it costs, in the Trainer's own log."""
        if self._told or not self._trainer.is_global_zero:
            return
        self._told = True
        count = self._trainer.accumulate_grad_batches
        logging.getLogger(type(self._trainer.fit_loop).__module__).info(
            f"HessianFreeMonitor: with accumulate_grad_batches={count} a step now holds the graphs of all {count} "
            f"micro-batches at once, and takes {2 * count - 1} gradients; HessianFreeMonitor(whole_batches=False) goes "
            "back to the curvature of the last one"
        )

    def _closure_of(self, micro: _MicroBatch, optimizer: Any) -> Any:
        """Return Lightning's closure without what clears the gradients."""
        loop = self._trainer.fit_loop.epoch_loop
        arguments = loop._build_kwargs(OrderedDict(), micro.batch, micro.number)
        made = loop.automatic_optimization._make_closure(arguments, optimizer, micro.number)
        return type(made)(made._step_fn, made._backward_fn)

    def _unsynchronised(self) -> Any:
        """Let gradients go round between processes with the last micro-batch alone, as the Trainer does."""
        return getattr(self._trainer.strategy, "block_backward_sync", contextlib.nullcontext)()
