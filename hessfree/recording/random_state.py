"""Every source of random numbers a closure may use, taken down and put back."""

from __future__ import annotations

import dataclasses
import random
import sys
from typing import Any

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class RandomState:
    """The state of torch's (CPU and accelerator), Python's and numpy's global generators.

    Attributes:
        cpu: State of torch's CPU generator.
        accelerators: State of the default generator of each accelerator in use, by device.
        python: State of the `random` module.
        numpy: State of `numpy.random`; None where numpy was never imported.
    """

    cpu: Tensor
    accelerators: dict[torch.device, Tensor]
    python: Any
    numpy: Any

    @classmethod
    def capture(cls, device: torch.device) -> RandomState:
        """Take down the present state.

        Args:
            device: Where the parameters live; its generator is taken down beside the CPU's.

        Returns:
            The state, independent of what is drawn from now on.
        """
        accelerators = {}
        if device.type not in {"cpu", "meta"}:
            accelerators[device] = _accelerator(device).get_rng_state(*_index(device))
        numpy = sys.modules.get("numpy")
        return cls(
            torch.get_rng_state(),
            accelerators,
            random.getstate(),
            None if numpy is None else numpy.random.get_state(),
        )

    def restore(self) -> None:
        """Put the state back."""
        torch.set_rng_state(self.cpu)
        for device, state in self.accelerators.items():
            _accelerator(device).set_rng_state(state, *_index(device))
        random.setstate(self.python)
        if self.numpy is not None:
            sys.modules["numpy"].random.set_state(self.numpy)


class GeneratorStates:
    """The states of the `torch.Generator` objects that a closure was seen to draw from.

    A state is taken down at the first sight of a generator, just before it is used, so that
    `restore` leads back to where the closure began.
    """

    def __init__(self) -> None:
        """Start with no generator seen."""
        self._states: dict[torch.Generator, Tensor] = {}

    def see(self, generator: torch.Generator) -> None:
        """Take down `generator`'s state unless it is known already."""
        if generator not in self._states:
            self._states[generator] = generator.get_state()

    def now(self) -> GeneratorStates:
        """Return the present states of the same generators."""
        other = GeneratorStates()
        other._states = {g: g.get_state() for g in self._states}
        return other

    def restore(self) -> None:
        """Put every state back."""
        for generator, state in self._states.items():
            generator.set_state(state)


def _accelerator(device: torch.device) -> Any:
    return getattr(torch, device.type)


def _index(device: torch.device) -> tuple[torch.device, ...]:
    # torch.mps has one generator and takes no device; torch.cuda and torch.xpu have one a device
    return () if device.type == "mps" else (device,)
