"""Three steps of HessianFree on each network, its products compared with the autograd graph's and with differences."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Generator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from hessfree import CG, ConstantDamping, GaussNewton, HessianFree, Identity
from hessfree.curvature import Curvature, CurvatureBuilder
from hessfree.linearization import GraphLinearization
from hessfree.operators.gauss_newton import GaussNewton as Operator
from hessfree.recording import (
    BufferStates,
    CallTree,
    Cut,
    Owners,
    Recording,
    call_at,
    find_cut,
    make_cut,
    twice_differentiable,
)
from hessfree.vectors import ParameterVector
from tests.architectures import DOUBLE
from tests.coverage.cases import CASES, Case
from tests.oracle import error

STEPS = 3
LARGE = 10**6  # parameters from which on the operator is examined at the first step only
HALF_STEP = 1e-6  # of a central difference in float64: its error is about 1e-9


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table. Errors are the largest relative ones of all steps.

    Attributes:
        name: The network.
        backend: The back end that "auto" chose in a step; "none" where there is none.
        in_operator: The back end that it chose in `GaussNewton.from_loss`.
        jvp: Error of J v, against the autograd graph of the same call.
        vjp: Error of Jᵀu.
        product: Error of G v.
        difference: Error of J v against central differences of the network.
        operator: Error of G v of `GaussNewton.from_loss`.
        message: The error that a network without back end ended in.
    """

    name: str
    backend: str
    in_operator: str
    jvp: float = 0.0
    vjp: float = 0.0
    product: float = 0.0
    difference: float = 0.0
    operator: float = 0.0
    message: str = ""

    def __str__(self) -> str:
        if self.message:
            return f"{self.name:30} {self.backend:7} {self.in_operator:9} {self.message[:90]}"
        errors = (self.jvp, self.vjp, self.product, self.difference, self.operator)
        return f"{self.name:30} {self.backend:7} {self.in_operator:9} " + " ".join(f"{e:8.1e}" for e in errors)


HEADER = f"{'network':30} {'step':7} {'from_loss':9} {'Jv':>8} {'Jᵀu':>8} {'Gv':>8} {'Jv(diff)':>8} {'from_loss':>8}"


def table() -> list[Row]:
    """Return all rows."""
    return [examine(name) for name in CASES]


@functools.cache
def examine(name: str) -> Row:
    """Take three steps on the network `name`, and return what was found."""
    case = CASES[name]
    torch.manual_seed(3)
    model = case.build().to(DOUBLE)
    run = Run(case, model)
    try:
        for step in range(STEPS):
            run.step(step)
    except (RuntimeError, NotImplementedError) as failure:
        return Row(name, "none", "none", message=str(failure).strip())
    worst = [max_or_nan(column) for column in zip(*run.errors, strict=True)]
    return Row(name, _one(run.backends), _one(run.in_operator), *worst)


def max_or_nan(numbers: tuple[float, ...]) -> float:
    """Return the largest; NaN if one of them is."""
    return max(numbers, key=lambda x: float("inf") if x != x else x)


class Run:
    """Steps of one optimizer on one network, watched from inside.

    Attributes:
        backends: What each step used.
        in_operator: What `GaussNewton.from_loss` used.
        errors: Of each step: J v, Jᵀu, G v, J v against differences, G v of `from_loss`.
    """

    def __init__(self, case: Case, model: nn.Module) -> None:
        self.case, self.model = case, model
        self.optimizer = HessianFree(
            [p for p in model.parameters() if p.requires_grad],
            lr=0.2,
            damping=1.0,
            damping_rule=ConstantDamping(),
            solver=CG(max_iterations=1),
            preconditioner=Identity(),
        )
        self.backends: list[str] = []
        self.in_operator: list[str] = []
        self.errors: list[tuple[float, ...]] = []

    def step(self, step: int) -> None:
        inputs, targets = self.case.inputs(step), self.case.targets(step)

        def forward() -> Tensor:
            return self.case.loss(self.model(*inputs), targets)

        def closure() -> Tensor:
            self.optimizer.zero_grad()
            loss = forward()
            loss.backward()
            return loss

        large = sum(p.numel() for p in self.model.parameters()) >= LARGE
        operator = 0.0 if large and step else self._operator(inputs, targets, seed=step)
        before = [p.detach().clone() for p in self.model.parameters()]
        with watched(lambda *found: self._compare(forward, step, operator, *found)):
            self.optimizer.step(closure)
        moved = any(not torch.equal(p, b) for p, b in zip(self.model.parameters(), before, strict=True))
        assert moved, "the parameters did not change between the steps"
        assert self.optimizer.last_step is not None
        self.backends.append(self.optimizer.last_step.backend)

    def _compare(
        self,
        forward: Callable[[], Tensor],
        seed: int,
        operator: float,
        curvature: Curvature,
        recording: Recording,
        parameters: ParameterVector,
    ) -> None:
        cut = make_cut(recording, parameters, find_cut(recording, parameters))
        true = GraphLinearization(cut.outputs, parameters)
        v, u = vector(parameters.size, 2 * seed), vector(true.space.size, 2 * seed + 1)
        found = curvature.operator
        assert isinstance(found, Operator)
        jv = true.jvp(v)
        along_z, along_theta = cut.tail.product(true.space.split(jv), parameters.split(v))
        gv = true.vjp(true.space.flatten(along_z)) + parameters.flatten(along_theta)
        errors = (
            error(found.linearization.jvp(v), jv),
            error(found.linearization.vjp(u), true.vjp(u)),
            max(error(found @ v, gv), error(found @ v, gv)),  # nothing that the first use left behind
            error(self._difference(forward, cut, recording, parameters, v), jv),
            operator,
        )
        self.errors.append(errors)

    def _difference(
        self, forward: Callable[[], Tensor], cut: Cut, recording: Recording, parameters: ParameterVector, v: Tensor
    ) -> Tensor:
        """Return (z(θ + hv) - z(θ - hv)) / 2h, evaluated as the closure was: no graph is involved."""
        backup, ends = parameters.backup(), []
        h = HALF_STEP * float(parameters.values().norm() / v.norm())
        for sign in (1, -1):
            tree = CallTree(Owners(parameters), parameters.device, lambda _: False, lambda _: True)
            parameters.try_step(backup, sign * h * v)
            recording.before.restore()
            with torch.enable_grad(), twice_differentiable(), recording.before.buffers.versions_kept(), tree:
                forward()
            places = [(path, i) for path, i in cut.place.places if path is not None]
            values = [call_at(tree.roots, path).outputs[i].value for path, i in places]
            ends.append(torch.cat([t.reshape(-1) for t in values if t is not None]))
        parameters.restore(backup)
        recording.after.restore()
        return (ends[0] - ends[1]) / (2 * h)

    def _operator(self, inputs: tuple[Any, ...], targets: Any, seed: int) -> float:
        """Return the error of `GaussNewton.from_loss` against the same with the autograd graph."""
        found = []
        buffers = BufferStates()
        buffers.see(self.model)
        for backend in ("graph", "auto"):
            torch.manual_seed(seed)
            operator = GaussNewton.from_loss(self.model, self.case.loss, inputs, targets, linearization=backend)
            found.append(operator @ vector(operator.size, seed))
            buffers.restore()
        self.in_operator.append(operator.linearization.name)
        return error(found[1], found[0])


@contextlib.contextmanager
def watched(see: Callable[[Curvature, Recording, ParameterVector], None]) -> Generator[None]:
    """Let `see` look at the curvature of every step, while its recording is alive."""
    build = CurvatureBuilder.build

    def built(self: Any, recording: Any, parameters: Any, *args: Any, **kwargs: Any) -> Curvature:
        curvature = build(self, recording, parameters, *args, **kwargs)
        see(curvature, recording, parameters)
        return curvature

    with mock.patch.object(CurvatureBuilder, "build", built):
        yield


def vector(size: int, seed: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def _one(names: list[str]) -> str:
    return " then ".join(dict.fromkeys(names))
