"""Hand a traced graph to torch.compile, and see that it computes the same."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from hessfree.linearization.base import in_words
from hessfree.linearization.selftest import close

Function = Callable[..., Any]


class CompilationError(RuntimeError):
    """torch.compile cannot serve a graph here; the message says why."""


def compiled(function: Function, examples: Sequence[Tensor]) -> Function:
    """Compile `function` for arguments like `examples`, and compare what it returns for them with `function` itself.

    Args:
        function: Of tensors, to tensors; it draws no random numbers.
        examples: Its arguments; later ones have the same shapes, dtypes and strides.

    Returns:
        The compiled function, to be called without gradients.

    Raises:
        CompilationError: There is no working compiler, it does not know an operation, or its code gives other numbers.
    """
    with torch.no_grad(), warnings.catch_warnings():
        # the compiler's advice is on code of its own, which nobody here can change
        warnings.simplefilter("ignore")
        try:
            fast = _undisturbed(torch.compile(function, dynamic=False))
            found = fast(*examples)
        except Exception as error:  # whatever a compiler fails of, the graph itself is as right
            raise CompilationError(in_words(error)) from error
        truth = function(*examples)
    # a mask of what is near zero may differ by rounding: the self-test tells whether it matters
    pairs = [(a, b) for a, b in zip(tree_leaves(found), tree_leaves(truth), strict=True) if b.is_floating_point()]
    if not all(close(a, b) for a, b in pairs):
        raise CompilationError("the compiled code gives other numbers than the operators it is made of")
    return fast


def _undisturbed(function: Function) -> Function:
    """Run compiled code where compiled modules of the user's are held back, which have no second derivative."""

    def run(*tensors: Tensor) -> Any:
        with torch.compiler.set_stance("default"):
            return function(*tensors)

    return run
