"""What must be the same for a trace to serve again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hessfree.linearization.traced.network import Network
from hessfree.linearization.traced.surroundings import hooks, is_plain
from hessfree.vectors import ParameterVector


def signature(network: Network, parameters: ParameterVector) -> tuple[Any, ...]:
    """Describe everything that tracing `network` looked at, apart from the values of tensors.

    Args:
        network: The network with its inputs.
        parameters: The parameters.

    Returns:
        Equal for networks that may share a trace, as long as their modules live.
    """
    return (
        id(network.module),
        tuple(map(_fingerprint, network.parts)),
        tuple((id(p.module), p.occurrence, p.leaf) for p in network.places),
        tuple(network.params.items()),
        tuple(network.constants.items()),
        tuple(map(_layout, parameters.params)),
        tuple(map(_layout, network.state)),
        tuple(map(_layout, network.inputs)),
        network.spec,
        tuple((type(leaf), leaf) for leaf in network.leaves),
        network.structure,
        network.autocast,
        torch.get_default_dtype(),
    )


def _fingerprint(module: nn.Module) -> tuple[Any, ...]:
    """Return the identity, hooks, train flag and plain settings of one module (a rate, a flag that detaches)."""
    settings = [(name, type(value), value) for name, value in module.__dict__.items() if is_plain(value)]
    return (id(module), type(module), hooks(module), *settings)


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device
