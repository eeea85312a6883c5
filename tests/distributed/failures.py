"""Checks of what one rank's trouble does to both."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from hessfree import HessianFree, LevenbergMarquardt
from hessfree.linearization import LinearizationError
from tests.distributed.training import batches, network, state_of


class Trouble(Exception):
    """Raised on purpose."""


class Fragile(nn.Module):
    """A network whose forward pass raises when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.broken = network(), False

    def forward(self, x: Tensor) -> Tensor:
        if self.broken:
            raise Trouble("in forward")
        return self.net(x)


class Scene:
    """One optimizer on this rank, and a closure in which something may go wrong at the next step."""

    def __init__(self, rank: int, **settings: Any) -> None:
        self.rank = rank
        self.module = Fragile()
        self.model = DistributedDataParallel(self.module)
        self.x, self.y = batches(40, 24)[rank]
        self.where = ""
        self.calls = 0
        settings = {"linearization": "graph", "damping_rule": LevenbergMarquardt(every=1)} | settings
        self.optimizer = HessianFree(self.model.parameters(), **settings)

    def closure(self) -> Tensor:
        self.calls += 1
        if self.where == "first" or (self.where == "replay" and self.calls > 1):
            raise Trouble(self.where)
        self.optimizer.zero_grad()
        self.module.broken = self.where == "forward"
        loss = F.mse_loss(self.model(self.x * float("nan") if self.where == "nan" else self.x), self.y)
        loss.backward()
        if self.where == "last":
            raise Trouble(self.where)
        return loss

    def step(self, where: str = "") -> Any:
        """Take a step with trouble on rank 1; return what was raised, and whether the parameters stayed."""
        self.where, self.calls = where if self.rank == 1 else "", 0
        before = [p.detach().clone() for p in self.model.parameters()]
        words = ""
        try:
            self.optimizer.step(self.closure)
        except Exception as error:
            words = f"{type(error).__name__}: {error}"
        stayed = all(torch.equal(p, q) for p, q in zip(before, self.model.parameters(), strict=True))
        report = self.optimizer.last_step
        return {"raised": words, "stayed": stayed, "status": None if report is None else report.status}


def in_the_closure(where: str) -> Callable[[int], Any]:
    def run(rank: int) -> Any:
        scene = Scene(rank)
        troubles = [scene.step(where)]
        scene.step()
        troubles.append(scene.step(where))
        scene.step()
        return troubles, state_of(scene.optimizer)

    return run


@contextlib.contextmanager
def broken(target: str, rank: int, error: Exception) -> Generator[None]:
    if rank == 1:
        with mock.patch(target, side_effect=error):
            yield
    else:
        yield


def inside(target: str) -> Callable[[int], Any]:
    """A function of the package fails on rank 1."""

    def run(rank: int) -> Any:
        scene = Scene(rank)
        scene.step()
        with broken(target, rank, Trouble("inside")):
            trouble = scene.step()
        scene.step()
        return [trouble], state_of(scene.optimizer)

    return run


def fallback(rank: int) -> Any:
    """The trace cannot be used on rank 1."""
    scene = Scene(rank, linearization="auto")
    with broken("hessfree.linearization.select._traced", rank, LinearizationError("on purpose")):
        scene.step()
    return state_of(scene.optimizer)


def translated(rank: int) -> Any:
    """Both closures turn errors into others, rank 0's that which rank 1's had caused."""
    scene = Scene(rank)
    plain = scene.closure

    def closure() -> Tensor:
        try:
            return plain()
        except Exception as error:
            raise ValueError("translated") from error

    scene.closure = closure
    trouble = scene.step("forward")
    return [trouble, scene.step()], state_of(scene.optimizer)


def no_wrapper(rank: int) -> Any:
    scene = Scene(rank)
    scene.model = scene.module
    return scene.step()


def not_averaged(rank: int) -> Any:
    scene = Scene(rank)
    with scene.model.no_sync():
        first = scene.step()
    return first, scene.step()


FAILURES: dict[str, Callable[[int], Any]] = {
    **{where: in_the_closure(where) for where in ("first", "forward", "last", "replay", "nan")},
    "product": inside("hessfree.operators.gauss_newton.GaussNewton.matvec"),
    "learning": inside("hessfree.preconditioners.kfac._measure"),
    "linearising": inside("hessfree.curvature.CurvatureBuilder._evaluate"),
}
CHECKS = FAILURES | {f.__name__: f for f in (fallback, translated, no_wrapper, not_averaged)}
