"""Checks of whole steps in two processes."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from hessfree import (
    CG,
    KFAC,
    Armijo,
    EmpiricalFisherDiagonal,
    HessianFree,
    Identity,
    Jacobi,
    LevenbergMarquardt,
    Nystrom,
    QuadraticModelMomentum,
    Woodbury,
)
from tests.distributed import failures
from tests.distributed.training import PINNED, batches, loop, network, on_a_rank, state_of

CHECKS: dict[str, Callable[[int], Any]] = dict(failures.CHECKS)
PRECONDITIONERS = {
    "kfac": KFAC(),
    "kfac_exact": KFAC(factors="exact"),
    "woodbury_all": Woodbury(samples=None),
    "woodbury_some": Woodbury(samples=20, kfac=KFAC(factors="exact")),
    "jacobi": Jacobi(method="exact"),
    "nystrom": Nystrom(rank=10, update_every=1),
}


SHARDED: tuple[tuple[Callable[[], nn.Module], dict[str, Any]], ...] = (
    (network, PINNED | {"linearization": "graph"}),
    # 371 parameters: the second half is one short
    (lambda: network().append(nn.PReLU().double()), PINNED | {"linearization": "graph"}),
    (network, {"line_search": Armijo(), "momentum": QuadraticModelMomentum(), "linearization": "graph"}),
    (network, {"solver": CG(max_iterations=1, every=2), "linearization": "graph"}),
)


TENSOR_PARALLEL: tuple[dict[str, Any], ...] = (
    PINNED,
    {"preconditioner": Jacobi(), "momentum": QuadraticModelMomentum()},
)


def check(function: Callable[[int], Any]) -> Callable[[int], Any]:
    CHECKS[function.__name__] = function
    return function


@check
def pinned(rank: int) -> Any:
    return state_of(on_a_rank(network(), batches(40, 24)[rank], 20, **PINNED))


@check
def sharded(rank: int) -> Any:
    """Vectors in parts."""
    return [
        state_of(on_a_rank(make(), batches(32, 32)[rank], 5, shard_vectors=True, **settings))
        for make, settings in SHARDED
    ]


@check
def traffic(rank: int) -> Any:
    """Bytes that each step hands to the communication of the package, by step, and iterations."""
    bytes_sent = 0

    def counted(function: Callable[..., Any], argument: int) -> Callable[..., Any]:
        def call(*args: Any, **settings: Any) -> Any:
            nonlocal bytes_sent
            bytes_sent += args[argument].numel() * args[argument].element_size()
            return function(*args, **settings)

        return call

    names = {"all_reduce": 0, "all_gather_single": 1, "reduce_scatter_single": 1}
    found = {}
    with contextlib.ExitStack() as stack:
        for name, argument in names.items():
            stack.enter_context(mock.patch.object(dist, name, counted(getattr(dist, name), argument)))
        for name, dtype, settings in (
            ("pinned", torch.float64, PINNED),
            ("sharded", torch.float64, {**PINNED, "shard_vectors": True}),
            ("defaults", torch.float32, {}),
        ):
            model = DistributedDataParallel(network(dtype))
            optimizer = HessianFree(model.parameters(), linearization="graph", **settings)
            x, y = batches(40, 24, dtype=dtype)[rank]
            found[name] = []
            for _ in range(8):
                bytes_sent = 0
                loop(optimizer, lambda model=model, x=x, y=y: F.mse_loss(model(x), y), 1)
                assert optimizer.last_step is not None
                found[name].append((bytes_sent, optimizer.last_step.iterations))
    return found


@check
def tensor_parallel(rank: int) -> Any:
    """A mesh of two: columns of the first layer, rows of the second; both processes have the same batch."""
    mesh = init_device_mesh("cpu", (2,))
    found = []
    for settings in TENSOR_PARALLEL:
        model = parallelize_module(network(), mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
        optimizer = HessianFree(model.parameters(), weight_decay=0.01, **settings)
        (x, y), *_ = batches(40)
        loop(optimizer, lambda model=model, x=x, y=y: F.mse_loss(model(x), y), 5)
        state = state_of(optimizer)
        state["parameters"] = [p.full_tensor() if isinstance(p, DTensor) else p for p in state["parameters"]]
        found.append(state)
    refused = []
    for settings in ({}, {"preconditioner": Identity(), "linearization": "traced"}):
        try:
            HessianFree(model.parameters(), **settings)
        except ValueError as error:
            refused.append(str(error))
    return found, refused


@check
def fully_sharded(rank: int) -> Any:
    """torch 2.14 gives no derivatives in the parameters of `fully_shard`."""
    model, (x, y) = network(), batches(40)[0]
    for part in (model[0], model[2], model[4], model):
        fully_shard(part, mesh=init_device_mesh("cpu", (2,)))
    z = model(x)
    torch_gives = torch.autograd.grad(z.sum(), list(model.parameters()), allow_unused=True)
    optimizer = HessianFree(model.parameters(), preconditioner=Identity())
    before = [p.detach().to_local().clone() for p in model.parameters()]
    try:
        loop(optimizer, lambda: F.mse_loss(model(x), y), 1)
        words = ""
    except RuntimeError as error:
        words = str(error)
    stayed = all(torch.equal(p, q.to_local()) for p, q in zip(before, model.parameters(), strict=True))
    return words, stayed, [g is None for g in torch_gives]


@check
def wrappers(rank: int) -> Any:
    """Settings of the wrapper that change its graph or its buckets."""
    return [
        state_of(on_a_rank(network(), batches(40, 24)[rank], 3, wrapper=wrapper, **PINNED | {"linearization": "graph"}))
        for wrapper in ({}, {"static_graph": True}, {"gradient_as_bucket_view": True})
    ]


@check
def buffers(rank: int) -> Any:
    """After a step with a replay, buffers are as after one forward pass under the wrapper, whose first rank's count."""
    model = network(torch.float32).insert(1, nn.BatchNorm1d(16))
    wrapped = DistributedDataParallel(model)
    optimizer = HessianFree(wrapped.parameters(), damping_rule=LevenbergMarquardt(every=1), linearization="graph")
    x, y = batches(40, 24, dtype=torch.float32)[rank]
    same = []
    for _ in range(3):
        other = DistributedDataParallel(copy.deepcopy(model))
        other(x)
        loop(optimizer, lambda: F.mse_loss(wrapped(x), y), 1)
        same.append(all(torch.equal(a, b) for a, b in zip(model.buffers(), other.module.buffers(), strict=True)))
    return same, state_of(optimizer)


@check
def mixed_samples(rank: int) -> str:
    model = network(torch.float32).insert(1, nn.SyncBatchNorm(16))
    x, y = batches(40, 24, dtype=torch.float32)[rank]
    try:
        loop(HessianFree(model.parameters(), process_group=dist.group.WORLD), lambda: F.mse_loss(model(x), y), 1)
    except RuntimeError as error:
        return str(error)
    return ""


class Mixed(nn.Module):
    """Dropout that differs by rank, parameters of no K-FAC layer, and one that is never used."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 24), nn.LayerNorm(24), nn.SELU(), nn.Dropout(0.2), nn.Linear(24, 2))
        self.scale = nn.Parameter(torch.ones(2))
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) * self.scale


@check
def defaults(rank: int) -> Any:
    model = DistributedDataParallel(Mixed(), find_unused_parameters=True)
    x, y = batches(300, 270, dtype=torch.float32)[rank]
    optimizer = HessianFree(model.parameters(), curvature_batch=0.9)
    torch.manual_seed(rank)
    loop(optimizer, lambda: F.mse_loss(model(x), y), 50)
    return state_of(optimizer)


@check
def recipes(rank: int) -> Any:
    """The recipe for fixed data, and a line search with momentum."""
    found = []
    for make, settings in (
        (HessianFree.full_batch, {}),
        (HessianFree.stochastic, {"line_search": Armijo(), "momentum": QuadraticModelMomentum()}),
        (HessianFree, {"preconditioner": EmpiricalFisherDiagonal(), "solver": CG(max_iterations=20, warm_start=0.9)}),
    ):
        model = DistributedDataParallel(network(torch.float32))
        x, y = batches(40, 24, dtype=torch.float32)[rank]
        optimizer = make(model.parameters(), **settings)
        loop(optimizer, lambda model=model, x=x, y=y: F.mse_loss(model(x), y), 12)
        found.append(state_of(optimizer))
    return found


@check
def preconditioners(rank: int) -> Any:
    return {
        name: state_of(
            on_a_rank(network(), batches(32, 32)[rank], 6, preconditioner=preconditioner, linearization="graph")
        )
        for name, preconditioner in PRECONDITIONERS.items()
    }


@check
def plain_group(rank: int) -> Any:
    """No DistributedDataParallel: the step averages the gradients, whether the closure has done so or not."""
    found = []
    for averages in (False, True):
        model, (x, y) = network(), batches(40, 24)[rank]
        optimizer = HessianFree(model.parameters(), process_group=dist.group.WORLD, **PINNED)

        def closure(model=model, optimizer=optimizer, averages=averages, x=x, y=y) -> Tensor:
            optimizer.zero_grad()
            loss = F.mse_loss(model(x), y)
            loss.backward()
            for p in model.parameters() if averages else ():
                dist.all_reduce(p.grad)
                p.grad /= 2
            return loss

        for _ in range(5):
            optimizer.step(closure)
        found.append(state_of(optimizer))
    return found


@check
def accumulated(rank: int) -> Any:
    """Two micro-batches, the first of them without communication."""
    model = DistributedDataParallel(network())
    optimizer = HessianFree(model.parameters(), **PINNED)
    x, y = batches(40, 24)[rank]
    half = len(x) // 2
    for _ in range(5):
        optimizer.zero_grad()
        with model.no_sync():
            (F.mse_loss(model(x[:half]), y[:half]) / 2).backward()

        def closure() -> Tensor:
            loss = F.mse_loss(model(x[half:]), y[half:]) / 2
            loss.backward()
            return loss

        optimizer.step(closure)
    assert optimizer.last_step is not None
    return state_of(optimizer) | {"ratio": optimizer.last_step.reduction_ratio}


@check
def resumed(rank: int) -> Any:
    """Six steps, and three with a checkpoint and three more."""
    batch = batches(40, 24)[rank]
    whole = state_of(on_a_rank(network(), batch, 6))
    model = network()
    kept = on_a_rank(model, batch, 3).state_dict()
    wrapped = DistributedDataParallel(model)
    optimizer = HessianFree(wrapped.parameters())
    optimizer.load_state_dict(kept)
    loop(optimizer, lambda: F.mse_loss(wrapped(batch[0]), batch[1]), 3)
    return whole, state_of(optimizer)
