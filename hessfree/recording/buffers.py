"""The buffers of the modules that a closure calls, taken down so that running statistics can be put back."""

from __future__ import annotations

import contextlib
from collections.abc import Generator

import torch
from torch import Tensor, nn


class BufferStates:
    """The values of buffers, and which objects they were.

    A buffer that was replaced by another tensor, or registered anew, is put back as the object it was.
    """

    def __init__(self) -> None:
        """Start with no module seen."""
        self._states: dict[nn.Module, dict[str, tuple[Tensor, Tensor] | None]] = {}

    def see(self, module: nn.Module) -> None:
        """Take down the buffers of `module` and its parts unless they are known already."""
        if module not in self._states:
            for part in module.modules():
                if part not in self._states:
                    self._states[part] = _taken_down(part)

    def now(self) -> BufferStates:
        """Return the present states of the same modules' buffers."""
        other = BufferStates()
        other._states = {module: _taken_down(module) for module in self._states}
        return other

    def restore(self) -> None:
        """Put every buffer back, unseen by autograd's version counters."""
        for module, states in self._states.items():
            for name in module._buffers.keys() - states.keys():
                del module._buffers[name]
            for name, state in states.items():
                if state is not None:
                    buffer, value = state
                    buffer.data.copy_(value)
                module._buffers[name] = None if state is None else buffer

    @contextlib.contextmanager
    def versions_kept(self) -> Generator[None]:
        """Hide from autograd what happens to the buffers inside, which are restored before it ends.

        A graph that saved one of them (an exponential average that scales the outputs) stays legal.

        Yields:
            Nothing.
        """
        buffers = tuple(s[0] for states in self._states.values() for s in states.values() if s is not None)
        if not buffers:
            yield
            return
        with torch.autograd._unsafe_preserve_version_counter(buffers):
            yield

    def finite(self) -> bool:
        """Tell whether every floating point buffer holds finite numbers only, as it is now."""
        return all(
            bool(torch.isfinite(buffer).all())
            for module in self._states
            for buffer in module._buffers.values()
            if buffer is not None and (buffer.is_floating_point() or buffer.is_complex())
        )


def _taken_down(module: nn.Module) -> dict[str, tuple[Tensor, Tensor] | None]:
    return {
        name: None if buffer is None else (buffer, buffer.detach().clone()) for name, buffer in module._buffers.items()
    }
