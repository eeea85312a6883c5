"""The self-test catches every kind of wrong linearisation, and passes a right one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hessfree.linearization import (
    Evaluation,
    FunctionalLinearization,
    GraphLinearization,
    Linearization,
    TraceCache,
    TracedLinearization,
    choose,
    find_fault,
)
from hessfree.recording import Output, find_cut, make_cut
from tests.networks import make
from tests.oracle import recorded


class Doctored:
    """A right linearisation until `change` touches a product."""

    name = "doctored"

    def __init__(self, right: GraphLinearization, change: Callable[[str, int, Tensor], Tensor]) -> None:
        self.space, self.outputs = right.space, right.outputs
        self._right, self._change, self._calls = right, change, 0

    def jvp(self, v: Tensor) -> Tensor:
        self._calls += 1
        return self._change("jvp", self._calls, self._right.jvp(v))

    def vjp(self, u: Tensor) -> Tensor:
        self._calls += 1
        return self._change("vjp", self._calls, self._right.vjp(u))

    def vjps(self, u: Tensor) -> Tensor:
        return self._right.vjps(u)


def scaled(which: str) -> Callable[[str, int, Tensor], Tensor]:
    return lambda name, _, t: t * (1 + 1e-6) if name == which else t


WRONG: dict[str, tuple[Callable[[str, int, Tensor], Tensor], str]] = {
    "jvp": (scaled("jvp"), "Jv differs"),
    "vjp": (scaled("vjp"), "Jᵀu differs"),
    "nan in jvp": (lambda name, _, t: t * float("nan") if name == "jvp" else t, "Jv differs"),
    "nan in vjp": (lambda name, _, t: t * float("nan") if name == "vjp" else t, "Jᵀu differs"),
    "second use": (lambda name, n, t: t if name == "vjp" or n == 1 else t + 1e-3, "Jv differs"),
    "third use": (lambda name, n, t: t if name == "vjp" or n <= 2 else t + 1e-3, "two results"),
    "zeros": (lambda _, __, t: torch.zeros_like(t), "Jv differs"),
}


def right(name: str = "mean_squared_error") -> tuple[GraphLinearization, object]:
    problem = make(name)
    return GraphLinearization(Output.all_of(problem.outputs()), problem.parameters), problem.parameters


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_products_are_found(kind: str) -> None:
    reference, parameters = right()
    change, words = WRONG[kind]
    fault = find_fault(Doctored(reference, change), reference, parameters)
    assert fault is not None
    assert words in fault


def test_a_right_one_passes() -> None:
    reference, parameters = right()
    assert find_fault(Doctored(reference, lambda _, __, t: t), reference, parameters) is None


def test_other_shapes_are_found() -> None:
    reference, parameters = right()
    other, _ = right("weighted_cross_entropy")
    fault = find_fault(Doctored(other, lambda _, __, t: t), reference, parameters)
    assert fault is not None
    assert "shapes" in fault


def chosen(backend: str) -> tuple[Linearization, list[str]]:
    problem = make("mean_squared_error")
    recording, parameters = recorded(problem), problem.parameters
    cut = make_cut(recording, parameters, find_cut(recording, parameters))
    said: list[str] = []
    evaluation = Evaluation(recording, cut.outputs, cut.calls, parameters)
    found = choose(backend, evaluation, parameters, TraceCache(), said.append)
    assert found is not None
    return found, said


def fail(*_: object) -> None:
    raise TypeError("no such thing")


@pytest.mark.parametrize("where", ["__init__", "jvp"])
def test_a_back_end_that_fails_is_replaced_with_one_warning(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FunctionalLinearization, where, fail)
    found, said = chosen("functional")
    assert found.name == "graph"
    assert len(said) == 1
    assert "no such thing" in said[0]


@pytest.mark.parametrize("backend", ["auto", "traced"])
def test_a_wrong_trace_is_replaced_with_one_warning(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right_product = TracedLinearization.vjp
    monkeypatch.setattr(TracedLinearization, "vjp", lambda self, u: right_product(self, u) * (1 + 1e-6))
    found, said = chosen(backend)
    assert found.name == "graph"
    assert said == ["the trace of Sequential is not used: its product Jᵀu differs from the autograd graph's"]


@pytest.mark.parametrize(("backend", "messages"), [("auto", 0), ("traced", 1)])
def test_a_network_that_cannot_be_traced(backend: str, messages: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What nobody asked for by name is replaced in silence."""
    monkeypatch.setattr("hessfree.linearization.traced.trace.capture", fail)
    found, said = chosen(backend)
    assert found.name == "graph"
    assert len(said) == messages
    assert all("linearization='traced' cannot be used" in why and "no such thing" in why for why in said)
