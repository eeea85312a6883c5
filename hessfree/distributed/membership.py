"""Which processes take a step together: found from what the closure called, or said by the user."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from hessfree.distributed.ranks import ALONE, Ranks
from hessfree.vectors import ParameterVector


def check_process_group(setting: Any) -> None:
    """Raise a ValueError unless `setting` is "auto", None or a process group."""
    if setting is None or (isinstance(setting, str) and setting == "auto"):
        return
    if not (callable(getattr(setting, "size", None)) and callable(getattr(setting, "rank", None))):
        raise ValueError(
            f"process_group={setting!r} must be 'auto' (that of the DistributedDataParallel that the closure calls), a "
            "torch.distributed.ProcessGroup over whose ranks to average, or None for this process alone"
        )


def world() -> int:
    """Return how many processes the default group has; 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def ranks_of(setting: Any, wrappers: Sequence[nn.Module], device: torch.device) -> Ranks:
    """Return the processes that take a step together.

    Args:
        setting: "auto", a process group, or None.
        wrappers: The DistributedDataParallel modules that the closure called.
        device: Where the parameters live.

    Returns:
        The ranks.

    Raises:
        RuntimeError: There are several processes, and nothing says whether they belong together; or what was said and
            what was called differ.
    """
    groups: list[Any] = list({id(w.process_group): w.process_group for w in wrappers}.values())
    if len(groups) > 1:
        raise RuntimeError(
            f"the closure calls DistributedDataParallel modules of {len(groups)} process groups, and one step has one; "
            "give each group its own optimizer"
        )
    if isinstance(setting, str):
        if groups:
            return Ranks(groups[0], device) if dist.get_world_size(groups[0]) > 1 else ALONE
        if world() == 1:
            return ALONE
        raise RuntimeError(
            f"the default process group has {world()} processes, and the closure calls no DistributedDataParallel: "
            "nothing says that they train one network. Wrap the model in DistributedDataParallel and call the wrapper; "
            "or pass process_group=torch.distributed.group.WORLD, and HessianFree averages the gradients itself; or "
            "pass process_group=None if every process trains a network of its own"
        )
    if groups and setting is None and dist.get_world_size(groups[0]) > 1:
        raise RuntimeError(
            "process_group=None says that this process trains alone, but the closure calls a DistributedDataParallel "
            f"of {dist.get_world_size(groups[0])} ranks; leave process_group='auto', or call its .module"
        )
    if setting is None or dist.get_world_size(setting) == 1:
        return ALONE
    if groups and groups[0] is not setting:
        raise RuntimeError(
            "process_group is another one than that of the DistributedDataParallel that the closure calls; leave it "
            "at 'auto'"
        )
    return Ranks(setting, device)


def guessed_ranks(setting: Any, device: torch.device) -> Ranks:
    """Return the ranks to tell of an error that came before any module was called: by default, everybody."""
    if setting is None or world() == 1:
        return ALONE
    return Ranks(dist.group.WORLD if isinstance(setting, str) else setting, device)


def average_gradients(ranks: Ranks, parameters: ParameterVector) -> None:
    """Replace every `p.grad` by its mean over the ranks; where all agree already, it stays what it is.

    Args:
        ranks: Who belongs together.
        parameters: The parameters.
    """
    mean = ranks.mean(parameters.gradients())
    for p, g in zip(parameters.params, parameters.views(mean), strict=True):
        if p.grad is None:
            p.grad = g.to(p.dtype)
        else:
            p.grad.copy_(g)


def synchronises(wrappers: Sequence[nn.Module]) -> bool:
    """Tell whether a backward pass now would average gradients: then all ranks must come to it, or none."""
    return any(cast(DistributedDataParallel, w).require_backward_grad_sync for w in wrappers)


@contextlib.contextmanager
def silent(wrappers: Sequence[nn.Module]) -> Generator[None]:
    """Keep DistributedDataParallel from sending anything while the network is only evaluated.

    The buffers that its first rank has were handed round before the recorded forward pass, and stand again.

    Args:
        wrappers: The modules.

    Yields:
        Nothing.
    """
    kept = [(w, w.require_backward_grad_sync, w.require_forward_param_sync) for w in wrappers]
    try:
        for w in wrappers:
            w.require_backward_grad_sync = w.require_forward_param_sync = cast(Any, False)
        yield
    finally:
        for w, backward, forward in kept:
            w.require_backward_grad_sync, w.require_forward_param_sync = backward, forward


def same_bits(rows: Sequence[Sequence[float]], what: Sequence[str]) -> None:
    """Check that numbers which all ranks computed from the same bits are the same.

    Args:
        rows: The numbers of every rank.
        what: What each of the numbers is.

    Raises:
        RuntimeError: They differ.
    """
    for name, values in zip(what, zip(*rows, strict=True), strict=True):
        if any(v != values[0] and not (v != v and values[0] != values[0]) for v in values):
            raise RuntimeError(
                f"{name} differs between the ranks ({', '.join(f'{v!r}' for v in values)}), which must hold the same "
                "parameters and gradients, bit for bit. Call the DistributedDataParallel wrapper, outside no_sync(), "
                "and clip or change gradients in the same way on all ranks"
            )
