"""What decides on the Jacobian beside tensors and plain settings, and may change without a trace to be seen in z."""

from __future__ import annotations

import argparse
import dataclasses
import types
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction

from hessfree.recording import Output

PLAIN_TYPES = frozenset({bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size})
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
# what nn.Module keeps for itself: tensors and modules are looked at elsewhere, hooks by `hooks`
INTERNAL = frozenset(nn.Module().__dict__) - {"training"}
LARGEST = 64  # entries of a container that are looked at; a vocabulary is no setting
DEEPEST = 3


def is_plain(value: Any) -> bool:
    """Tell whether `value` is a number, a word or a tuple of such."""
    kind = type(value)
    return kind in PLAIN_TYPES or (kind is tuple and all(map(is_plain, value)))


def structure(outputs: Sequence[Output]) -> tuple[tuple[Any, ...], bool]:
    """Describe the autograd graph that leads to `outputs`: a detached branch gives the same z, and another graph.

    Args:
        outputs: z.

    Returns:
        The names of the nodes with how they are joined, and whether one of them is a custom Function, whose
        backward may do anything.
    """
    numbers: dict[Any, int] = {}
    found: list[Any] = []
    custom = False
    stack: list[Any] = [o.edge.node for o in outputs]
    while stack:
        node = stack.pop()
        if node is None or node in numbers:
            found.append(None if node is None else numbers[node])
            continue
        numbers[node] = len(numbers)
        found.append(node.name())
        custom = custom or isinstance(node, BackwardCFunction)
        stack.extend(following for following, _ in node.next_functions)
    return tuple(found), custom


def hooks(module: nn.Module) -> tuple[Any, ...]:
    """Return the numbers of the hooks of `module`: torch gives none of them twice."""
    held = module.__dict__
    return tuple(tuple(held[name]) for name in HOOKS if held[name])


def surroundings(modules: Sequence[nn.Module]) -> tuple[Any, ...]:
    """Describe attributes of modules that are neither tensors nor plain, and globals that their code names.

    Args:
        modules: A network and all modules in it.

    Returns:
        Equal as long as nothing of it changed that can be seen.
    """
    found: list[Any] = []
    for module in modules:
        odd = [
            (name, _describe(value, DEEPEST))
            for name, value in module.__dict__.items()
            if name not in INTERNAL and not is_plain(value) and not isinstance(value, Tensor)
        ]
        if odd:
            found.append(tuple(odd))
        named = _globals(type(module).forward)
        if named:
            found.append(named)
    return tuple(found)


def _describe(value: Any, depth: int) -> Any:
    if is_plain(value):
        return (type(value).__name__, value)
    if isinstance(value, Tensor | nn.Module) or depth == 0:
        return type(value).__name__
    if isinstance(value, list | tuple | set | frozenset):
        entries = list(value) if len(value) <= LARGEST else []
        return (type(value).__name__, len(value), tuple(_describe(v, depth - 1) for v in entries))
    if isinstance(value, dict):
        pairs = list(value.items()) if len(value) <= LARGEST else []
        return ("dict", len(value), tuple((str(k), _describe(v, depth - 1)) for k, v in pairs))
    if isinstance(value, types.MethodType):
        return (id(value.__self__), _describe(value.__func__, depth))
    if isinstance(value, types.FunctionType):
        held = [_content(cell) for cell in value.__closure__ or ()]
        return (value.__code__, _describe([value.__defaults__, *held], depth - 1), _globals(value))
    return (type(value).__name__, id(value), _settings(value, depth))


def _settings(value: Any, depth: int) -> Any:
    """Describe an object that is a bag of settings; a trainer or a logger changes at every step, and is none."""
    attributes = getattr(value, "__dict__", {})
    bag = dataclasses.is_dataclass(value) or isinstance(value, types.SimpleNamespace | argparse.Namespace)
    if bag or all(map(is_plain, attributes.values())):
        return _describe(attributes, depth)
    return None


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


def _globals(function: Any) -> tuple[Any, ...]:
    """Return the plain values of the globals that a function names."""
    code = getattr(function, "__code__", None)
    if code is None:
        return ()
    known = function.__globals__
    return tuple((name, known[name]) for name in code.co_names if name in known and is_plain(known[name]))
