"""Dense matrices to compare with.

The oracle knows nothing of recordings or graphs: it puts a flat vector of parameters into the model by
`functional_call`, and takes first derivatives of z and second derivatives of ell(z, theta) by
`torch.autograd.functional`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from hessfree.recording import CallTree, Owners, Recording, record
from tests.architectures import DOUBLE
from tests.problem import Problem


@dataclasses.dataclass
class Truth:
    """What the oracle knows: dense matrices."""

    jacobian: Tensor  # [Z, P]
    output_hessian: Tensor  # [Z, Z]
    gauss_newton: Tensor  # [P, P]
    outputs: Tensor  # [Z]
    gradient: Tensor  # [P]


class _Bound(nn.Module):
    def __init__(self, model: nn.Module, function: Callable[..., Any]) -> None:
        super().__init__()
        self.model, self.function = model, function

    def forward(self, *args: Any) -> Any:
        return self.function(*args)


def at(problem: Problem, theta: Tensor, function: Callable[..., Any], *args: Any) -> Any:
    """Call `function` with the flat vector `theta` in place of the model's parameters, from seed 0."""
    params = [p for p in problem.model.parameters() if p.requires_grad]
    pieces = {id(p): t.view_as(p) for p, t in zip(params, theta.split([p.numel() for p in params]), strict=True)}
    # every module once, under every parameter that it holds: functional_call spoils modules that it meets twice
    state = {
        f"model.{prefix}.{name}".replace("..", "."): pieces[id(p)]
        for prefix, part in problem.model.named_modules()
        for name, p in part._parameters.items()
        if p is not None and id(p) in pieces
    }
    torch.manual_seed(0)
    return functional_call(_Bound(problem.model, function), state, args, tie_weights=False)


def flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])


def truth(problem: Problem) -> Truth:
    """Differentiate `problem` densely at its present parameters; the global generator is left at seed 0."""
    theta = flat([p.detach() for p in problem.model.parameters() if p.requires_grad])
    with torch.random.fork_rng(devices=[]):
        values = [t.detach() for t in at(problem, theta, problem.outputs)]
        shapes, sizes = [t.shape for t in values], [t.numel() for t in values]

        def joint(zt: Tensor) -> Tensor:
            z, t = zt.split([sum(sizes), theta.numel()])
            pieces = tuple(p.view(s) for p, s in zip(z.split(sizes), shapes, strict=True))
            return at(problem, t, problem.ell, pieces)

        jacobian = torch.autograd.functional.jacobian(lambda t: flat(at(problem, t, problem.outputs)), theta)
        hessian = torch.autograd.functional.hessian(joint, torch.cat([flat(values), theta]))
        gradient = torch.autograd.functional.jacobian(lambda t: at(problem, t, problem.forward), theta)
    full = torch.cat([jacobian, torch.eye(theta.numel(), dtype=DOUBLE)])
    count = sum(sizes)
    torch.manual_seed(0)
    return Truth(jacobian, hessian[:count, :count], full.T @ hessian @ full, flat(values), gradient)


def error(found: Tensor, true: Tensor) -> float:
    """Relative error in the Frobenius norm; absolute where the truth is zero. NaN stays NaN."""
    assert found.shape == true.shape
    scale = float(true.norm())
    return float((found - true).norm()) / (scale if scale > 0 else 1.0)


def recorded(problem: Problem, closure: Callable[[], Any] | None = None, keep_inputs: bool = True) -> Recording:
    """Record the problem's closure as the optimizer does."""
    parameters = problem.parameters
    tree = CallTree(Owners(parameters), parameters.device, lambda _: keep_inputs, lambda _: True)
    return record(closure or problem.closure, parameters, tree)
