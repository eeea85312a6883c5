"""Residuals taken from what autograd saved of the recorded call: no second forward pass, and never another network."""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hessfree.linearization.traced import TraceCache, TracedLinearization
from hessfree.linearization.traced.trace import Trace
from tests.architectures import DOUBLE, mlp, randn
from tests.linearization.traced.recorder import both_of, disagreement, parameters_of, record_call


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x).mean(1)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cells, self.out = nn.GRU(3, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.cells(x)[0][:, -1])


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.tanh(self.layer(x)) * 2)


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).mul_(0.5).sigmoid_()


def images() -> nn.Module:
    layers = [nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Flatten()]
    return nn.Sequential(*layers, nn.Dropout(0.4), nn.Linear(16, 3))


def rows() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 6), nn.GELU(), nn.LayerNorm(6), nn.Linear(6, 5), nn.SELU(), nn.Linear(5, 2))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "tanh": (lambda: mlp(3, 4, 2), (5, 3)),
    "normalised": (rows, (5, 3)),
    "images": (images, (6, 2, 6, 6)),
    "attention": (Attention, (4, 5, 8)),
    "recurrent": (Recurrent, (4, 5, 3)),
    "tied": (Tied, (5, 3)),
    "in place": (InPlace, (5, 3)),
}


def accept(traced: TracedLinearization) -> TracedLinearization:
    traced.accept()
    return traced


@pytest.mark.parametrize("name", NETWORKS)
def test_the_closures_own_forward_is_the_primal_run(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    make, shape = NETWORKS[name]
    model, cache = make().to(DOUBLE).train(), TraceCache()
    for step in range(4):
        call = record_call(model, randn(*shape, seed=step))
        traced, graph = both_of(call, call.outputs, parameters_of(model), cache)
        assert traced.recorded is (step > 0)
        assert disagreement(traced, graph, seed=step) <= 1e-11
        accept(traced)
        monkeypatch.setattr(Trace, "evaluate", None)  # from now on nothing may run the network
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1 * torch.randn_like(p))


class Free(nn.Module):
    """Code that changes from call to call by what no signature holds."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)
        self._function = [function]

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self._function[0](self.first(x)))


def linearized_after(before: Callable[[Tensor], Tensor], after: Callable[[Tensor], Tensor]) -> tuple[bool, float]:
    """Trace a network, change its code unseen, and return whether its saved tensors were used, and the error."""
    torch.manual_seed(0)
    model, cache = Free(before).to(DOUBLE), TraceCache()
    # a graph of another form would be traced anew, and what is asked here is whether saved tensors alone can tell
    with mock.patch("hessfree.linearization.traced.network.structure", lambda _: ((), False)):
        for function in (before, before, after):
            model._function[0] = function
            call = record_call(model, randn(5, 3))
            traced, graph = both_of(call, call.outputs, parameters_of(model), cache)
            accept(traced)
    assert cache.misses == 1
    return traced.recorded, disagreement(traced, graph)


MASKS = [[1.0, 0.0, 2.0, 1.0], [0.0, 1.0, 1.0, 3.0]]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (lambda h: torch.tanh(h) * 2.0, lambda h: torch.tanh(h) * 3.0),
        (lambda h: F.elu(h, 1.0), lambda h: F.elu(h, 2.0)),
        (lambda h: h.tanh(), lambda h: h.sigmoid()),
        (lambda h: h.tanh() * h.sigmoid(), lambda h: h.sigmoid() * h.tanh() * h.tanh()),
        (lambda h: F.leaky_relu(h, 0.1), lambda h: F.leaky_relu(h, 0.2)),
        (lambda h: h.roll(1, 1).tanh(), lambda h: h.roll(2, 1).tanh()),
        (lambda h: h[:, [0, 1, 2, 3]].tanh(), lambda h: h[:, [1, 0, 2, 3]].tanh()),
        (lambda h: (h * h).tanh(), lambda h: (h * h.detach()).tanh()),
    ],
    ids=["a factor", "a setting", "an operator", "a branch", "a slope", "a shift", "an index", "detached"],
)
def test_code_that_changed_is_not_taken_for_what_was_traced(
    before: Callable[[Tensor], Tensor], after: Callable[[Tensor], Tensor]
) -> None:
    recorded, error = linearized_after(before, after)
    assert not recorded or error <= 1e-11
    recorded, error = linearized_after(before, before)
    assert recorded and error <= 1e-11


def test_a_tensor_that_changed_is_taken_from_the_call() -> None:
    # the trace holds the first mask as a literal, and the autograd graph of the call the second one
    recorded, error = linearized_after(
        lambda h: h.tanh() * torch.tensor(MASKS[0], dtype=DOUBLE),
        lambda h: h.tanh() * torch.tensor(MASKS[1], dtype=DOUBLE),
    )
    assert recorded and error <= 1e-12


def test_two_tensors_in_the_place_of_one_are_noticed() -> None:
    torch.manual_seed(0)
    model, cache, other = Tied().to(DOUBLE), TraceCache(), randn(5, 3, seed=9)
    swap = False

    def forward(x: Tensor) -> Tensor:
        return model.layer(x) * torch.sigmoid(model.layer(other if swap else x))

    model.forward = forward  # type: ignore[method-assign]
    for swap in (False, False, True):  # noqa: B007 - read by forward
        call = record_call(model, randn(5, 3))
        traced = accept(TracedLinearization(call, call.outputs, parameters_of(model), cache))
        assert traced.recorded is (cache.hits == 1)


def test_tensors_written_into_after_the_call_are_not_used() -> None:
    class Leaking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.out = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            kept.append(self.layer(x).tanh())
            return self.out(kept[-1])

    torch.manual_seed(0)
    kept: list[Tensor] = []
    model, cache = Leaking().to(DOUBLE), TraceCache()
    for step in range(3):
        call = record_call(model, randn(5, 3))
        if step == 2:
            with torch.no_grad():
                kept[-1].zero_()
        traced = accept(TracedLinearization(call, call.outputs, parameters_of(model), cache))
        assert traced.recorded is (step == 1)


class Squared(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, g):  # type: ignore[no-untyped-def]
        return 2 * ctx.saved_tensors[0] * g


@pytest.mark.parametrize(
    "function",
    [Squared.apply, lambda h: checkpoint(torch.tanh, h, use_reentrant=False)],
    ids=["a custom function", "a checkpoint"],
)
def test_what_hides_or_recomputes_its_tensors_is_run_again(function: Callable[[Tensor], Tensor]) -> None:
    recorded, error = linearized_after(function, function)
    assert not recorded
    assert error <= 1e-12


def test_a_part_of_the_batch_is_run_again() -> None:
    model, cache, x = mlp(3, 4, 2), TraceCache(), randn(5, 3)
    for _ in range(2):
        call = record_call(model, x)
        part = TracedLinearization(call, call.outputs, parameters_of(model), cache, arguments=((x[:2],), {}))
        accept(part)
        assert not part.recorded
        assert part.space.shapes == [torch.Size((2, 2))]


def test_a_graph_that_was_freed_is_run_again() -> None:
    model, cache = mlp(3, 4, 2), TraceCache()
    for step in range(3):
        tensors: list[Tensor] = []
        handle = model.register_forward_hook(lambda m, a, z, kept=tensors: kept.append(z))
        call = record_call(model, randn(5, 3))
        handle.remove()
        if step == 2:
            tensors[0].sum().backward()
        traced = accept(TracedLinearization(call, call.outputs, parameters_of(model), cache))
        assert traced.recorded is (step == 1)
