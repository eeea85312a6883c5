"""Networks, unequal batches and loops that two processes and one process run alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves

from hessfree import CG, HessianFree, Identity, LevenbergMarquardt
from tests.architectures import DOUBLE

Batches = list[tuple[Tensor, Tensor]]

PINNED: dict[str, Any] = {
    "solver": CG(max_iterations=200, tolerance=1e-10, progress=None),
    "preconditioner": Identity(),
    "damping_rule": LevenbergMarquardt(every=1),
}


def network(dtype: torch.dtype = DOUBLE) -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 2)
    return nn.Sequential(*layers).to(dtype)


def batches(*sizes: int, dtype: torch.dtype = DOUBLE, classes: int = 0) -> Batches:
    """One batch a rank."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for size in sizes:
        x = torch.randn(size, 3, generator=generator, dtype=dtype)
        noise = torch.randn(size, 2, generator=generator, dtype=dtype)
        found.append((x, torch.stack([x[:, 0] * x[:, 1], x[:, 2].sin()], 1) + 0.1 * noise))
    return found


def loop(optimizer: HessianFree, loss: Callable[[], Tensor], steps: int) -> None:
    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    for _ in range(steps):
        optimizer.step(closure)


def on_a_rank(
    model: nn.Module, batch: tuple[Tensor, Tensor], steps: int, wrapper: dict[str, Any] | None = None, **settings: Any
) -> HessianFree:
    """Train under DistributedDataParallel on this rank's batch."""
    wrapped = DistributedDataParallel(model, **(wrapper or {}))
    optimizer = HessianFree(wrapped.parameters(), **settings)
    loop(optimizer, lambda: F.mse_loss(wrapped(batch[0]), batch[1]), steps)
    return optimizer


def alone(model: nn.Module, parts: Batches, steps: int, **settings: Any) -> HessianFree:
    """Train in one process on the mean of the losses of all batches."""
    optimizer = HessianFree(model.parameters(), **settings)
    loop(optimizer, lambda: sum_of(model, parts) / len(parts), steps)
    return optimizer


def sum_of(model: nn.Module, parts: Batches) -> Tensor:
    return torch.stack([F.mse_loss(model(x), y) for x, y in parts]).sum()


def state_of(optimizer: HessianFree) -> dict[str, Any]:
    """Parameters, what the optimizer remembers, and λ."""
    report = optimizer.last_step
    assert report is not None
    groups = optimizer.param_groups
    return {
        "parameters": [p.detach().clone() for group in groups for p in group["params"]],
        "state": optimizer.state_dict()["state"],
        "damping": groups[0]["damping"],
        "status": report.status,
        "backend": report.backend,
        "evaluations": report.evaluations,
    }


def same_bits(a: Any, b: Any) -> bool:
    left, right = tree_leaves(a), tree_leaves(b)
    return len(left) == len(right) and all(
        torch.equal(x, y) if isinstance(x, Tensor) else x == y for x, y in zip(left, right, strict=True)
    )


def difference(state: Any, reference: HessianFree) -> float:
    """The largest difference of parameters, over their norm."""
    a = torch.cat([p.reshape(-1) for p in state["parameters"]])
    b = torch.cat([p.detach().reshape(-1) for group in reference.param_groups for p in group["params"]])
    return float((a - b).abs().max() / b.norm())
