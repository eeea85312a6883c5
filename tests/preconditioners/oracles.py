"""Samples for preconditioners, and what their factors should be, from autograd's dense Jacobians and Hessians."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from hessfree.losses import OutputHessian
from hessfree.preconditioners import Sample
from hessfree.recording import CallTree, Owners, Tail
from hessfree.vectors import FlatSpace, ParameterVector

Loss = Callable[[Any], Tensor]  # of what the model returned


def sample_of(model: nn.Module, inputs: Any, loss_fn: Loss, seed: int = 0) -> Sample:
    parameters = ParameterVector([p for p in model.parameters() if p.requires_grad])
    with CallTree(Owners(parameters), parameters.device, lambda _: True, lambda _: True) as tree:
        returned = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    (call,) = tree.roots
    outputs = call.outputs
    tail = Tail(loss_fn(returned), outputs, parameters.params)
    space = FlatSpace([o.shape for o in outputs], [o.dtype for o in outputs], outputs[0].device)
    hessian = OutputHessian(lambda w: tail.product(w)[0], space, [o.value for o in outputs])
    samples = outputs[0].shape[0] if outputs[0].shape else 1
    return Sample(parameters, outputs, (call,), hessian, tuple(tail.gradients), samples, seed)


def output_hessian(model: nn.Module, inputs: Any, loss_fn: Loss) -> Tensor:
    """Return H `[Z, Z]`."""
    leaves, structure = tree_flatten(model(inputs))

    def of_flat(flat: Tensor) -> Tensor:
        pieces = zip(flat.split([t.numel() for t in leaves]), leaves, strict=True)
        return loss_fn(tree_unflatten([piece.view(t.shape) for piece, t in pieces], structure))

    return torch.autograd.functional.hessian(of_flat, _flat(leaves).detach())


def _flat(returned: Any) -> Tensor:
    """Return z `[Z]`, all tensors of what a model returned."""
    return torch.cat([t.reshape(-1) for t in tree_leaves(returned)])


def gauss_newton(model: nn.Module, inputs: Any, loss_fn: Loss) -> Tensor:
    """Return G = JᵀHJ `[P, P]` in the order of the parameters that require grad."""
    params = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    jacobian = jacrev(lambda values: _flat(functional_call(model, values, (inputs,))))(params)
    dense = torch.cat([jacobian[name].reshape(-1, p.numel()) for name, p in params.items()], 1)
    return dense.T @ output_hessian(model, inputs, loss_fn) @ dense


@dataclasses.dataclass
class Factors:
    """Sums over the rows of every call of the Linear layers with one weight."""

    rows: list[Tensor]
    outer: Tensor

    @property
    def inner(self) -> Tensor:
        a = torch.cat(self.rows)
        return a.T @ a / len(a)


def exact_factors(model: nn.Module, inputs: Any, loss_fn: Loss) -> dict[int, Factors]:
    """Return A and S = Σ_rows (∂z/∂row)ᵀ H (∂z/∂row) by id of the weight, from the definition of "expand"."""
    calls: list[tuple[nn.Linear, Tensor, Tensor]] = []

    def note(module: nn.Module, args: Any, output: Tensor) -> None:
        assert isinstance(module, nn.Linear)
        calls.append((module, args[0].detach(), output))

    handles = [m.register_forward_hook(note) for m in model.modules() if isinstance(m, nn.Linear)]
    z = _flat(model(inputs))
    for handle in handles:
        handle.remove()
    hessian = output_hessian(model, inputs, loss_fn)
    found: dict[int, Factors] = {}
    for module, a, output in calls:
        rows = [torch.autograd.grad(k, output, retain_graph=True, allow_unused=True)[0] for k in z]
        jacobian = torch.stack([torch.zeros_like(output) if r is None else r for r in rows])
        jacobian = jacobian.reshape(len(z), -1, output.shape[-1])
        outer = torch.einsum("zro,zy,yrp->op", jacobian, hessian, jacobian)
        a = a.reshape(-1, a.shape[-1])
        if module.bias is not None and module.bias.requires_grad:
            a = torch.cat([a, torch.ones_like(a[:, :1])], 1)
        factors = found.setdefault(id(module.weight), Factors([], torch.zeros_like(outer)))
        factors.rows.append(a)
        factors.outer += outer
    return found


def full(factor: Tensor) -> Tensor:
    """Return a factor as a matrix: a diagonal one is held as its diagonal."""
    return torch.diag(factor) if factor.ndim == 1 else factor


def block_places(block: dict[str, Any], parameters: ParameterVector) -> Tensor:
    """Return where the entries of the block S ⊗ A stand in the flat vector."""
    weight = parameters.params[block["weight"]]
    places = torch.arange(parameters.size)[parameters.slice_of(weight)].reshape(len(weight), -1)
    if block["bias"] is not None:
        bias = torch.arange(parameters.size)[parameters.slice_of(parameters.params[block["bias"]])]
        places = torch.cat([places, bias[:, None]], 1)
    return places.reshape(-1)


def dense(state: dict[str, Any], parameters: ParameterVector) -> Tensor:
    """Return the matrix that a state of K-FAC stands for, undamped."""
    matrix = torch.zeros(parameters.size, parameters.size, dtype=parameters.dtype)
    for block in state["blocks"]:
        places = block_places(block, parameters)
        matrix[places[:, None], places] = torch.kron(full(block["outer"]), full(block["inner"]))
    for i, d in state["diagonal"].items():
        place = parameters.slice_of(parameters.params[i])
        matrix[place, place] = torch.diag(d.reshape(-1))
    return matrix
