"""A closure run on every rank of a group at once: one loss, one gradient, and an error on one is an error on all."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from typing import Any

import torch

from hessfree.distributed import (
    ALONE,
    average_gradients,
    guessed_ranks,
    mean,
    ranks_of,
    same_bits,
    synchronises,
)
from hessfree.recording.calls import CallTree
from hessfree.recording.closure import Closure, Recording, record
from hessfree.vectors import ParameterVector


class Together:
    """The ranks that take one optimizer's steps.

    A step's status is exchanged before the forward and the backward pass of DistributedDataParallel, which would wait
    for a rank that has failed, and before anything else is decided.

    Attributes:
        setting: "auto", a process group, or None.
        ranks: Who takes the present step.
    """

    def __init__(self, setting: Any) -> None:
        """Take the setting.

        Args:
            setting: "auto", a process group, or None.
        """
        self.setting = setting
        self.ranks = ALONE
        self._known = False

    @contextlib.contextmanager
    def telling(self) -> Generator[None]:
        """Let the other ranks know of an error inside, which they would wait for.

        Yields:
            Nothing.
        """
        try:
            yield
        except Exception as error:
            self.ranks.tell(error)

    def record(self, closure: Closure, parameters: ParameterVector, tree: CallTree, stale: bool) -> Recording:
        """Run `closure` as `hessfree.recording.record` does, on every rank.

        Args:
            closure: As for `torch.optim.LBFGS`.
            parameters: The parameters.
            tree: Records the module calls.
            stale: Whether `p.grad` is left from an earlier step.

        Returns:
            The recording of this rank.

        Raises:
            RuntimeError: Who belongs together is not known; or another rank failed.
        """
        if parameters.divided:
            self.ranks = ALONE
        elif not self._known:
            self.ranks = guessed_ranks(self.setting, parameters.device)

        def before_backward() -> None:
            self._meet(parameters, tree)
            if synchronises(tree.wrappers):
                self.ranks.agree()

        def before_wrapper() -> None:
            self._meet(parameters, tree)
            if synchronises(tree.wrappers) and torch.is_grad_enabled():
                self.ranks.agree()

        tree.before_wrapper = before_wrapper
        return record(closure, parameters, tree, stale, before_backward)

    def share(self, recording: Recording, parameters: ParameterVector, accumulated: float) -> None:
        """Make the loss of `recording` the mean over the ranks, and its gradient that of the mean.

        Args:
            recording: A recording of this rank; changed.
            parameters: The parameters.
            accumulated: Over how many micro-batches `p.grad` is summed.

        Raises:
            RuntimeError: The ranks hold other parameters or gradients; or one of them failed.
        """
        ranks = self.ranks
        if ranks.size == 1:
            return
        averaged = bool(recording.wrappers)
        if not averaged:
            ranks.agree()
            average_gradients(ranks, parameters)
        norms = [float(parameters.gradients().norm()), float(parameters.values().norm())]
        rows = ranks.agree(None, recording.value, *norms, accumulated, recording.accumulated, bool(recording.roots))
        same_bits(
            [row[1:] for row in rows],
            (
                "the norm of the gradient",
                "the norm of the parameters",
                "the number of accumulated batches",
                "whether gradients were accumulated",
                "whether the closure calls modules",
            ),
        )
        recording.value = mean(row[0] for row in rows)
        if recording.accumulated or not averaged:
            # what was there before the last micro-batch had not been averaged, and its mean is what was subtracted
            ranks.mean(recording.gradient)

    def _meet(self, parameters: ParameterVector, tree: CallTree) -> None:
        if parameters.divided and not tree.wrappers:
            return  # tensor parallel: every process of the mesh has the same loss, and whole vectors
        try:
            ranks = ranks_of(self.setting, tree.wrappers, parameters.device)
        except RuntimeError:
            self.ranks = ALONE  # nobody waits for a word
            raise
        if not self._known or ranks.group is not self.ranks.group:
            self.ranks = ranks
        self._known = True
