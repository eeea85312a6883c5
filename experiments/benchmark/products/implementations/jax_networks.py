"""The workloads written in JAX, on the parameters of the torch network under their torch names."""

from collections.abc import Callable
from typing import Any

from torch import nn

from experiments.benchmark.products.implementations.base import UnsupportedError
from experiments.benchmark.products.networks import ConvNet, Transformer
from experiments.benchmark.products.workloads import Workload
from experiments.models import ToyMLP

Array = Any
Parameters = dict[str, Array]
Forward = Callable[[Parameters, Array], Array]


def forward(model: nn.Module) -> Forward:
    """Return the network as a function of its named parameters and inputs.

    Args:
        model: A torch network.

    Returns:
        A function that JAX can differentiate and compile.

    Raises:
        UnsupportedError: If nobody has written this network in JAX here.
    """
    if isinstance(model, ConvNet):
        return _conv_net
    if isinstance(model, Transformer):
        layers, heads = model.layers, model.heads
        return lambda p, tokens: _transformer(p, tokens, layers, heads)
    chain, prefix = (model.net, "net.") if isinstance(model, ToyMLP) else (model, "")
    if isinstance(chain, nn.Sequential) and all(isinstance(part, nn.Linear | nn.Tanh | nn.SELU) for part in chain):
        return _perceptron(chain, prefix)
    raise UnsupportedError(f"{type(model).__name__} is not written in JAX here")


def loss(workload: Workload) -> Callable[[Array, Array], Array]:
    """Return the workload's loss of outputs and targets."""
    import jax
    import jax.numpy as jnp

    if isinstance(workload.loss, nn.MSELoss):
        return lambda z, y: jnp.mean((z - y) ** 2)
    return lambda z, y: -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(z), y[:, None], axis=1))


def _linear(p: Parameters, name: str, x: Array) -> Array:
    return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]


def _perceptron(chain: nn.Sequential, prefix: str) -> Forward:
    import jax
    import jax.numpy as jnp

    def apply(p: Parameters, x: Array) -> Array:
        for index, part in enumerate(chain):
            if isinstance(part, nn.Linear):
                x = _linear(p, f"{prefix}{index}", x)
            else:
                x = jnp.tanh(x) if isinstance(part, nn.Tanh) else jax.nn.selu(x)
        return x

    return apply


def _conv_net(p: Parameters, x: Array) -> Array:
    import jax
    from jax import lax

    for name in ("first", "second"):
        x = lax.conv_general_dilated(x, p[f"{name}.weight"], (1, 1), "SAME", dimension_numbers=("NCHW", "OIHW", "NCHW"))
        x = jax.nn.relu(x + p[f"{name}.bias"][:, None, None])
        x = lax.reduce_window(x, -float("inf"), lax.max, (1, 1, 2, 2), (1, 1, 2, 2), "VALID")
    return _linear(p, "last", x.reshape(len(x), -1))


def _layer_norm(p: Parameters, name: str, x: Array) -> Array:
    import jax

    return jax.nn.standardize(x, axis=-1, epsilon=1e-5) * p[f"{name}.weight"] + p[f"{name}.bias"]


def _transformer(p: Parameters, tokens: Array, layers: int, heads: int) -> Array:
    import jax
    import jax.numpy as jnp

    x = p["tokens.weight"][tokens] + p["places"]
    batch, length, width = x.shape
    mask = jnp.tril(jnp.ones((length, length), bool))
    for index in range(layers):
        name = f"blocks.{index}"
        qkv = _linear(p, f"{name}.qkv", _layer_norm(p, f"{name}.norm1", x))
        query, key, value = qkv.reshape(batch, length, 3, heads, -1).transpose(2, 0, 3, 1, 4)
        scores = query @ key.swapaxes(-1, -2) / (width // heads) ** 0.5
        mixed = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf)) @ value
        x = x + _linear(p, f"{name}.project", mixed.swapaxes(1, 2).reshape(batch, length, width))
        hidden = jax.nn.gelu(_linear(p, f"{name}.expand", _layer_norm(p, f"{name}.norm2", x)), approximate=False)
        x = x + _linear(p, f"{name}.contract", hidden)
    return _linear(p, "head", _layer_norm(p, "norm", x)).reshape(batch * length, -1)
