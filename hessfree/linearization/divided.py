"""Run a model chunk by chunk, and record it as one call whose graph begins at its outputs."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_map, tree_unflatten

from hessfree.linearization.base import LinearizationError
from hessfree.linearization.chunked import check_microbatch, chunks_of
from hessfree.linearization.evaluation import arguments_of, same_numbers
from hessfree.precision import unit
from hessfree.recording import (
    BufferStates,
    Call,
    CallTree,
    Output,
    Owners,
    RandomState,
    collect_marks,
    twice_differentiable,
)
from hessfree.vectors import ParameterVector


@dataclasses.dataclass(frozen=True, eq=False)
class Divided:
    """A model's run over all samples, of which no graph was kept.

    Attributes:
        returned: What the model returns for all samples. What depends on parameters begins a graph of its own.
        roots: The call of the model, with the outputs for all samples, and inside it the calls that it made for a
            chunk, without their tensors.
        buffers: The buffers of the modules called, as they were before.
        samples: How many samples there are.
    """

    returned: Any
    roots: list[Call]
    buffers: BufferStates
    samples: int


def run_divided(model: nn.Module, inputs: Any, parameters: ParameterVector, size: int) -> Divided | None:
    """Run `model` on chunks of the samples, and see that it does not mix them.

    The outputs are computed twice, with boundaries half a chunk apart: a network that mixes samples (BatchNorm in
    train mode), or draws other random numbers for a part of the batch (dropout), gives itself away. Memory is that of
    one chunk and of all outputs.

    Args:
        model: The model.
        inputs: A tensor, a tuple of positional arguments, or a dict of keyword arguments. The first tensor in it
            tells the number of samples, and every tensor of that length along dimension 0 is divided.
        parameters: The parameters.
        size: Samples in a chunk.

    Returns:
        The run; None where one chunk holds all samples. Random generators and buffers are left as after a call on the
        first chunk.

    Raises:
        ValueError: The arguments hold no samples, or an output that depends on parameters has none.
        LinearizationError: The model mixes samples.
    """
    check_microbatch(size)
    count = next((t.shape[0] for t in tree_leaves(inputs) if isinstance(t, Tensor) and t.ndim), 0)
    if count == 0:
        raise ValueError(f"microbatch={size} divides the inputs along dimension 0, and finds no samples there")
    if count <= size:
        return None
    runner = _Runner(model, inputs, count, parameters)
    leaves = runner.joined(chunks_of(count, size))
    half = [slice(0, size // 2), *chunks_of(count, size, size // 2)] if size > 1 else chunks_of(count, 2)
    for rows in half:
        if not runner.agrees(leaves, rows):
            raise LinearizationError(
                f"microbatch={size} cannot be used: {type(model).__name__} gives a sample other outputs in another "
                "part of the batch (BatchNorm in train mode, dropout); call model.eval(), or use microbatch=None"
            )
    return runner.recorded(leaves)


class _Runner:
    """Calls a model on parts of its arguments, each time in the same world."""

    def __init__(self, model: nn.Module, inputs: Any, count: int, parameters: ParameterVector) -> None:
        self._model, self._inputs, self._count, self._device = model, inputs, count, parameters.device
        self._tree = CallTree(Owners(parameters), parameters.device, lambda _: False, lambda _: False)
        self._spec: TreeSpec | None = None
        self._first: Call | None = None

    def joined(self, chunks: list[slice]) -> list[Any]:
        """Return the leaves of what the model returns for all samples; tensors of samples are new, without graph."""
        pieces = [self._run(rows) for rows in chunks]
        leaves = []
        for i, parts in enumerate(zip(*pieces, strict=True)):
            divided = all(_has_samples(t, rows.stop - rows.start) for t, rows in zip(parts, chunks, strict=True))
            if i in self._depends and not (divided and parts[0].is_floating_point()):
                raise ValueError(
                    f"{type(self._model).__name__} returned a tensor of shape {tuple(parts[0].shape)} and dtype "
                    f"{parts[0].dtype} for {chunks[0].stop} samples, whose parts microbatch= cannot join; return real "
                    "outputs with the samples along dimension 0, and compute the loss of them in loss_fn"
                )
            # a parameter that is returned as it is stays itself
            joined = divided and not parts[0].requires_grad
            leaves.append(torch.cat(parts).requires_grad_(i in self._depends) if joined else parts[0])
        return leaves

    def agrees(self, leaves: list[Any], rows: slice) -> bool:
        """Tell whether the model's outputs for `rows` alone are those among `leaves`."""
        return all(map(functools.partial(self._same, rows), self._run(rows), leaves))

    def _same(self, rows: slice, new: Any, whole: Any) -> bool:
        if not isinstance(whole, Tensor):
            return True
        known = whole[rows] if _has_samples(whole, self._count) else whole
        if known.dtype.is_floating_point:
            assert self._first is not None
            rounded = [torch.finfo(dtype).eps for _, dtype in self._first.autocast]
            tolerance = max(unit(known.dtype, known.device), *rounded, 0.0) ** 0.5
            return same_numbers(new, known, whole.detach().abs().max(), tolerance)
        return torch.equal(new, known)

    def recorded(self, leaves: list[Any]) -> Divided:
        """Leave the world as one call leaves it, and return the record."""
        assert self._spec is not None and self._first is not None
        for state in self._after:
            state.restore()
        # a view, since an output is no leaf of a graph
        with torch.enable_grad():
            views = [t.view_as(t) if i in self._depends else t for i, t in enumerate(leaves)]
        returned = tree_unflatten(views, self._spec)
        root = dataclasses.replace(self._first, outputs=Output.all_of(returned))
        root.inputs, root.keywords = arguments_of(self._inputs)
        return Divided(returned, [root], self._tree.buffers, self._count)

    def _run(self, rows: slice) -> list[Any]:
        inputs = tree_map(lambda t: t[rows] if _has_samples(t, self._count) else t, self._inputs)
        args, kwargs = arguments_of(inputs)
        with torch.enable_grad(), twice_differentiable(), collect_marks() as marks:
            if self._first is None:
                with self._tree:
                    returned = self._model(*args, **kwargs)
                self._after = RandomState.capture(self._device), self._tree.buffers.now()
                self._remember(self._tree.roots.pop(), returned)
            else:
                assert self._first.random is not None
                self._first.random.restore()
                self._tree.buffers.restore()
                returned = self._model(*args, **kwargs)
        if marks:
            raise ValueError(
                f"{type(self._model).__name__} calls mark_outputs, and microbatch= cuts the network at what the model "
                "returns; return what is marked, or use microbatch=None"
            )
        leaves, spec = tree_flatten(returned)
        if self._spec is not None and self._spec != spec:
            raise LinearizationError(f"{type(self._model).__name__} returns other structures for other samples")
        self._spec = spec
        return [t.detach() if isinstance(t, Tensor) and t.grad_fn is not None else t for t in leaves]

    def _remember(self, call: Call, returned: Any) -> None:
        """Keep what is the same for every chunk, and no tensor of this one: it would keep a graph alive."""
        leaves = enumerate(tree_leaves(returned))
        self._depends = {i for i, t in leaves if isinstance(t, Tensor) and t.grad_fn is not None}
        (nothing,) = Output.all_of(torch.zeros((), requires_grad=True).clone())
        self._first = _bare(call, nothing)


def _has_samples(leaf: Any, count: int) -> bool:
    return isinstance(leaf, Tensor) and leaf.ndim > 0 and leaf.shape[0] == count


def _bare(call: Call, output: Output) -> Call:
    """Return the same calls without arguments, and with `output` in the place of each of theirs."""
    outputs = (output,) * len(call.outputs)
    children = [_bare(child, output) for child in call.children]
    return Call(call.module, (), {}, outputs, children, call.path, call.random, call.autocast)
