"""Forward passes by operators that torch can differentiate twice."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Generator
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook


@contextlib.contextmanager
def twice_differentiable() -> Generator[None]:
    """Make every forward pass inside differentiable twice.

    Fused attention has neither forward mode nor double backward, and compiled modules and cuDNN's recurrent layers no
    double backward: their plain forms are exact, and enough.

    Yields:
        Nothing.
    """
    with sdpa_kernel(SDPBackend.MATH), _plain_recurrent_layers():
        if "torch._dynamo" in sys.modules:  # importing it takes seconds, and without it nothing is compiled
            _expect_hooks_on_compiled_modules()
            with torch.compiler.set_stance("force_eager"):
                yield
        else:
            yield


@contextlib.contextmanager
def _plain_recurrent_layers() -> Generator[None]:
    """Switch cuDNN off while an `nn.RNN`, `nn.LSTM` or `nn.GRU` runs, and for nothing else: convolutions need it."""
    if not torch.cuda.is_initialized():
        yield
        return
    before: list[bool] = []

    def enter(module: nn.Module, inputs: Any) -> None:
        if isinstance(module, nn.RNNBase):
            before.append(torch._C._get_cudnn_enabled())
            torch._C._set_cudnn_enabled(False)

    def leave(module: nn.Module, inputs: Any, returned: Any) -> None:
        if isinstance(module, nn.RNNBase):
            torch._C._set_cudnn_enabled(before.pop())

    hooks = (register_module_forward_pre_hook(enter), register_module_forward_hook(leave, always_call=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


_HOOKS_ON_COMPILED = "Using `torch.compile.module.` when there are global hooks on modules"


def _expect_hooks_on_compiled_modules() -> None:
    """Keep compiled modules from warning of our hooks, which a second call for the same module does not disturb.

    The filter stays: to take it back after every call would make Python show every other warning again.
    """
    if not any(f[1] is not None and f[1].pattern == _HOOKS_ON_COMPILED for f in warnings.filters):
        warnings.filterwarnings("ignore", message=_HOOKS_ON_COMPILED, category=UserWarning)
