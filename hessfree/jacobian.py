"""Derivatives with respect to the input, sample by sample: Jacobians, their products, and the divergence.

For z = f(x), row by row x `[B, D]` -> z `[B, D']`, sample b has its own Jacobian J_b = ∂z_b/∂x_b `[D', D]`. Row i of
J_b is J_bᵀe_i (one reverse pass), column j is J_b e_j (one forward pass): D' reverse or D forward passes give all of
it, whichever are fewer, at once for all samples. A double loop of `torch.autograd.grad` makes B·D' reverse passes
instead, one after the other.

Everywhere `function` is called on batches of one, under `torch.func.vmap`: a sample never sees another one. Layers that
mix samples, as BatchNorm in train mode does, fail with their own message and are never differentiated wrongly.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Generator
from typing import Any, Literal

import torch
from torch import Tensor
from torch.func import jacfwd, jacrev, jvp, vjp, vmap

from hessfree.recording import twice_differentiable

Mode = Literal["auto", "forward", "reverse"]
_NUMBERS = 2**25  # of Jacobians, computed at once


def batch_jacobian(
    function: Callable[..., Tensor], inputs: Tensor, *others: Any, mode: Mode = "auto", chunk_size: int | None = None
) -> Tensor:
    """Return the Jacobian of every sample.

    Args:
        function: Takes batches `[B, D]` and `others`, returns `[B, D']`: a module, or any function of tensors. More
            dimensions after the first are welcome.
        inputs: x `[B, D]`.
        *others: Further arguments, in which nothing is differentiated: tensors with B rows are taken row by row;
            numbers, tensors without dimensions and anything else are the same for all samples.
        mode: "reverse" by rows, "forward" by columns, "auto" by the fewer of them (reverse on MPS, where layers have
            no forward formulas).
        chunk_size: Samples at a time, which bounds the memory besides the result's; None: as many as have about
            2²⁵ numbers in their Jacobians (128 MB in float32).

    Returns:
        J `[B, D', D]`. It can be differentiated in the parameters; under `torch.no_grad` it has no graph.

    Raises:
        ValueError: If the shapes do not fit, or `mode` or `chunk_size` is none.
    """
    if mode not in ("auto", "forward", "reverse"):
        raise ValueError(f"{mode=} is unknown: choose 'auto', 'forward' or 'reverse'")
    one = _one_sample(function, inputs, others)
    if len(inputs) == 0:
        return inputs.new_zeros(0, *function(inputs, *others).shape[1:], *inputs.shape[1:])
    row = (inputs[:1], *(_first_row(other) for other in others))
    with torch.no_grad(), twice_differentiable():  # as below, so that BatchNorm cannot count the row as a batch
        shape = vmap(lambda x, *rest: _pullback(lambda x: one(x, *rest), x)[0], _dims(others))(*row).shape[1:]
    size = inputs[0].numel()
    if mode == "auto":
        mode = "forward" if size < shape.numel() and inputs.device.type != "mps" else "reverse"
    chunk = _chunk(chunk_size, size * shape.numel())
    with _forward_mode() if mode == "forward" else twice_differentiable():
        transform = jacfwd if mode == "forward" else jacrev
        return vmap(transform(one), _dims(others), chunk_size=chunk)(inputs, *others)


def batch_jvp(
    function: Callable[..., Tensor], inputs: Tensor, v: Tensor, *others: Any, mode: Mode = "auto"
) -> tuple[Tensor, Tensor]:
    """Return z and J_b v_b of every sample, without any J.

    Args:
        function: As for `batch_jacobian`.
        inputs: x `[B, D]`.
        v: Directions in the inputs, `[B, D]`.
        *others: As for `batch_jacobian`.
        mode: "forward", one forward pass; "reverse", by differentiating u ↦ Jᵀu, which is linear in u with the
            transpose J (on MPS, where layers have no forward formulas); "auto".

    Returns:
        z `[B, D']` and Jv `[B, D']`.

    Raises:
        ValueError: If the shapes do not fit, or `mode` is none.
    """
    if mode not in ("auto", "forward", "reverse"):
        raise ValueError(f"{mode=} is unknown: choose 'auto', 'forward' or 'reverse'")
    one = _one_sample(function, inputs, others)
    _check_like("v", v, inputs)
    if mode == "auto":
        mode = "reverse" if inputs.device.type == "mps" else "forward"

    def forward(x: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        found = jvp(lambda x: one(x, *rest), (x,), (v,))
        return found[0], found[1]

    def reverse(x: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        z, pull = _pullback(lambda x: one(x, *rest), x)
        return z, vjp(lambda u: pull(u)[0], torch.zeros_like(z))[1](v)[0]

    with _forward_mode() if mode == "forward" else twice_differentiable():
        return vmap(forward if mode == "forward" else reverse, (0, *_dims(others)))(inputs, v, *others)


def batch_vjp(function: Callable[..., Tensor], inputs: Tensor, u: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    """Return z and J_bᵀu_b of every sample, without any J: what `torch.autograd.grad` does with `grad_outputs=u`.

    Args:
        function: As for `batch_jacobian`.
        inputs: x `[B, D]`.
        u: Directions in the outputs, `[B, D']`.
        *others: As for `batch_jacobian`.

    Returns:
        z `[B, D']` and Jᵀu `[B, D]`.

    Raises:
        ValueError: If the shapes do not fit.
    """
    one = _one_sample(function, inputs, others)
    if u.shape[:1] != inputs.shape[:1]:
        raise ValueError(f"u has shape {list(u.shape)}, inputs {list(inputs.shape)}: give one row a sample")

    def single(x: Tensor, u: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        z, pull = _pullback(lambda x: one(x, *rest), x)
        return z, pull(u)[0]

    with twice_differentiable():
        return vmap(single, (0, *_dims(others)))(inputs, u, *others)


def divergence(
    function: Callable[..., Tensor], inputs: Tensor, *others: Any, chunk_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return z and the divergence tr J_b of every sample, exactly: D reverse passes.

    Args:
        function: As for `batch_jacobian`, with D' = D.
        inputs: x `[B, D]`.
        *others: As for `batch_jacobian`.
        chunk_size: As for `batch_jacobian`.

    Returns:
        z `[B, D]` and tr J `[B]`.

    Raises:
        ValueError: If the shapes do not fit, D' ≠ D among them.
    """
    one = _one_sample(function, inputs, others)
    size = inputs[:1].numel()

    def single(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        z, pull = _pullback(lambda x: one(x, *rest), x)
        _check_like("the function's output", z, x)
        units = torch.eye(size, dtype=z.dtype, device=z.device).reshape(size, *x.shape)
        return z, vmap(pull)(units)[0].reshape(size, size).diagonal().sum()

    with twice_differentiable():
        return vmap(single, _dims(others), chunk_size=_chunk(chunk_size, size**2))(inputs, *others)


def hutchinson_divergence(
    function: Callable[..., Tensor], inputs: Tensor, noise: Tensor, *others: Any
) -> tuple[Tensor, Tensor]:
    """Return z and an estimate εᵀJ_bε of the divergence of every sample: one reverse pass.

    E[εεᵀ] = I makes it unbiased (Hutchinson 1990). With random signs its variance is Σ_{i<j} (J_ij + J_ji)², and zero
    where J is diagonal. Along a trajectory the noise has to stay the same, or the field of an ODE solver is no function
    (Grathwohl et al. 2019, FFJORD, sec. 3.1).

    Args:
        function: As for `batch_jacobian`, with D' = D.
        inputs: x `[B, D]`.
        noise: ε `[B, D]`, independent of x, with zero mean and unit covariance.
        *others: As for `batch_jacobian`.

    Returns:
        z `[B, D]` and the estimates `[B]`.

    Raises:
        ValueError: If the shapes do not fit, D' ≠ D among them.
    """
    _check_like("noise", noise, inputs)
    z, pulled = batch_vjp(function, inputs, noise, *others)
    _check_like("the function's output", z, inputs)
    return z, (pulled * noise).flatten(1).sum(1)


def _one_sample(function: Callable[..., Tensor], inputs: Tensor, others: tuple[Any, ...]) -> Callable[..., Tensor]:
    """Return the function of one sample `[D]`, and of one row of each other tensor, that `function` is of batches."""
    if inputs.dim() < 2 or not inputs.dtype.is_floating_point:
        raise ValueError(f"inputs are {inputs.dtype} {list(inputs.shape)}: give floating-point numbers [B, D]")
    for place, other in enumerate(others):
        if _has_rows(other) and len(other) != len(inputs):
            raise ValueError(
                f"argument {place + 1} after the inputs has shape {list(other.shape)}, they have {list(inputs.shape)}: "
                "give one row a sample, or a number for all"
            )

    def one(x: Tensor, *rest: Any) -> Tensor:
        rows = (part.unsqueeze(0) if _has_rows(other) else part for part, other in zip(rest, others, strict=True))
        z = function(x.unsqueeze(0), *rows)
        if z.shape[:1] != (1,):
            raise ValueError(
                f"the function returns {list(z.shape)} for one sample: give one that keeps the batch's rows"
            )
        return z.squeeze(0)

    return one


def _pullback(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor]]]:
    found = vjp(function, x)
    return found[0], found[1]


def _has_rows(other: Any) -> bool:
    return isinstance(other, Tensor) and other.dim() > 0


def _first_row(other: Any) -> Any:
    return other[:1] if _has_rows(other) else other


def _dims(others: tuple[Any, ...]) -> tuple[int | None, ...]:
    return (0, *(0 if _has_rows(other) else None for other in others))


def _chunk(chunk_size: int | None, numbers: int) -> int:
    if chunk_size is None:
        return max(1, _NUMBERS // max(1, numbers))
    if chunk_size < 1:
        raise ValueError(f"{chunk_size=} makes no progress: give 1 or more, or None")
    return chunk_size


def _check_like(name: str, tensor: Tensor, inputs: Tensor) -> None:
    if tensor.shape != inputs.shape:
        raise ValueError(f"{name} has shape {list(tensor.shape)}, the inputs {list(inputs.shape)}: they must agree")


@contextlib.contextmanager
def _forward_mode() -> Generator[None]:
    with twice_differentiable(), warnings.catch_warnings():
        # the first forward-mode call of a process scripts some decompositions with torch.jit, which is deprecated
        warnings.filterwarnings("ignore", message=".*torch.jit.*", category=Warning)
        yield
