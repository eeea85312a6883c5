"""Everything outside the parameters that a forward pass may change."""

from __future__ import annotations

import dataclasses

import torch

from hessfree.recording.buffers import BufferStates
from hessfree.recording.random_state import GeneratorStates, RandomState


@dataclasses.dataclass(frozen=True, eq=False)
class World:
    """Random generators and buffers, as they were at one moment.

    Attributes:
        random: The global random generators.
        generators: The `torch.Generator` objects that the closure drew from.
        buffers: The buffers of the modules that the closure called.
    """

    random: RandomState
    generators: GeneratorStates
    buffers: BufferStates

    def now(self, device: torch.device) -> World:
        """Return the same things as they are now."""
        return World(RandomState.capture(device), self.generators.now(), self.buffers.now())

    def restore(self) -> None:
        """Put everything back."""
        self.random.restore()
        self.generators.restore()
        self.buffers.restore()
