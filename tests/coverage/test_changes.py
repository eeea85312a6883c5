"""Whatever changes between two steps, the next products are of the network as it is now."""

from __future__ import annotations

import dataclasses
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from hessfree import HessianFree, Identity, linearize
from tests.architectures import DOUBLE, mlp, randn
from tests.coverage.cases import Case, rows, values
from tests.coverage.modules import Between
from tests.coverage.study import Run, vector, watched
from tests.oracle import error

FLOW = 1.0  # a global that decides how much gradient flows
KEEP = [1.0]


@pytest.fixture(autouse=True)
def _global_flow() -> Iterator[None]:
    yield
    globals()["FLOW"] = 1.0


def attenuated(h: Tensor, flow: float) -> Tensor:
    """The same numbers whatever `flow` is, and another derivative."""
    return h * flow + (h * (1 - flow)).detach()


@dataclasses.dataclass
class Settings:
    flow: float = 1.0
    stopped: bool = False


class Plain:
    """A settings object that is no dataclass."""

    def __init__(self) -> None:
        self.flow = 1.0


class Reversed(torch.autograd.Function):
    """The identity, whose backward is multiplied by a global."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * KEEP[0]


def set_global(_: nn.Module) -> None:
    globals()["FLOW"] = 0.25


def hooked(_: nn.Module, h: Tensor) -> Tensor:
    h.register_hook(lambda g: g * KEEP[0])
    return h.tanh()


def with_settings(settings: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        model = Between(lambda net, h: attenuated(h.tanh(), net.settings.flow))
        model.settings = settings() if callable(settings) else settings
        return model

    return build


def flag() -> nn.Module:
    model = Between(lambda net, h: h.tanh().detach() + 0 * h if bool(net.mask.any()) else h.tanh())
    model.mask = torch.zeros(3)
    return model


def with_list() -> nn.Module:
    model = Between(lambda net, h: attenuated(h.tanh(), net.schedule["flow"][0]))
    model.schedule = {"flow": [1.0, 0.5]}
    return model


def with_function() -> nn.Module:
    model = Between(lambda net, h: attenuated(h.tanh(), net.flow()))
    model.flow = lambda: 1.0
    return model


def normed() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(0.3), nn.Linear(4, 2))


def halved(_: nn.Module, inputs: Any, gradients: Any) -> Any:
    return tuple(None if g is None else 0.5 * g for g in gradients)


def set_settings(model: nn.Module) -> None:
    model.settings.flow = 0.25


def replace_forward(model: nn.Module) -> None:
    model.forward = types.MethodType(lambda self, x: self[4](attenuated(self[0](x), 0.5)), model)


def backward_hook_replaced(model: nn.Module) -> None:
    model.handle.remove()
    model.handle = model[1].register_full_backward_hook(lambda m, i, g: None)


def with_backward_hook() -> nn.Module:
    model = mlp(3, 4, 2)
    model.handle = model[1].register_full_backward_hook(lambda m, i, g: None if KEEP[0] == 1 else (KEEP[0] * i[0],))
    return model


class Doubled(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return 2 * w


def parametrized(model: nn.Module) -> None:
    parametrize.register_parametrization(model[0], "weight", Doubled())


def data_swapped(model: nn.Module) -> None:
    model[0].weight.data = randn(3, 4, seed=9).T  # other strides, too


def tied(model: nn.Module) -> None:
    model[2].weight = model[0].weight


def buffer_in_place(model: nn.Module) -> None:
    model[1].running_mean.add_(3.0)


def buffer_replaced(model: nn.Module) -> None:
    model[1].running_var = 5 * torch.ones(4, dtype=DOUBLE)


def setting(name: str, value: Any) -> Callable[[nn.Module], None]:
    def change(model: nn.Module) -> None:
        part, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(part), attribute, value)

    return change


def keep(factor: float) -> Callable[[nn.Module], None]:
    return lambda _: KEEP.__setitem__(0, factor)


CHANGES: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], Any]]] = {
    "dropout rate": (normed, setting("3.p", 0.6)),
    "eval mode": (normed, lambda m: m.eval()),
    "one layer in eval mode": (normed, lambda m: m[1].eval()),
    "momentum of BatchNorm": (normed, setting("1.momentum", None)),
    "slope": (lambda: nn.Sequential(nn.Linear(3, 4), nn.LeakyReLU(), nn.Linear(4, 2)), setting("1.negative_slope", 2)),
    "another activation": (lambda: mlp(3, 4, 2), lambda m: m.__setitem__(1, nn.Softplus())),
    "a frozen layer": (lambda: mlp(3, 4, 2), lambda m: m[0].requires_grad_(False)),
    "forward hook": (lambda: mlp(3, 4, 2), lambda m: m[1].register_forward_hook(lambda *a: a[2].detach() + 0 * a[2])),
    "forward pre-hook": (lambda: mlp(3, 4, 2), lambda m: m[1].register_forward_pre_hook(lambda _, a: (a[0] * 2,))),
    "backward hook": (lambda: mlp(3, 4, 2), lambda m: m[1].register_full_backward_hook(halved)),
    "backward pre-hook": (
        lambda: mlp(3, 4, 2),
        lambda m: m[1].register_full_backward_pre_hook(lambda _, g: (0.5 * g[0],)),
    ),
    "backward hook replaced": (with_backward_hook, backward_hook_replaced),
    "forward of the object": (normed, replace_forward),
    "parametrization": (lambda: mlp(3, 4, 2), parametrized),
    "data swapped": (lambda: mlp(3, 4, 2), data_swapped),
    "weights tied": (lambda: mlp(2, 2, 2), tied),
    "buffer in place": (lambda: normed().eval(), buffer_in_place),
    "buffer replaced": (lambda: normed().eval(), buffer_replaced),
    "flag in a tensor": (flag, lambda m: m.mask.fill_(1)),
    "settings in a dataclass": (with_settings(Settings), set_settings),
    "settings in an object": (with_settings(Plain), set_settings),
    "settings in a namespace": (with_settings(lambda: types.SimpleNamespace(flow=1.0)), set_settings),
    "settings replaced": (with_settings(Settings), setting("settings", Settings(0.5))),
    "settings in lists": (with_list, lambda m: m.schedule["flow"].__setitem__(0, 0.3)),
    "function replaced": (with_function, setting("flow", lambda: 0.4)),
    "global": (lambda: Between(lambda _, h: attenuated(h.tanh(), FLOW)), set_global),
    "factor of a custom backward": (lambda: Between(lambda _, h: Reversed.apply(h.tanh())), keep(-0.5)),
    "factor of a hook on a tensor": (lambda: Between(hooked), keep(0.5)),
    "factor of a hook on a module": (with_backward_hook, keep(0.5)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_change_between_steps(name: str) -> None:
    build, change = CHANGES[name]
    KEEP[0] = 1.0
    torch.manual_seed(3)
    width = 2 if name == "weights tied" else 3
    run = Run(Case(build, rows(6, width), values(6, 2)), build().to(DOUBLE))
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")  # where a trace is given up a warning says so
        for step in range(4):
            if step == 2:
                change(run.model)
            run.step(step)
    assert len(run.errors) == 4
    for jvp, vjp, product, _, operator in run.errors:
        assert all(found <= 1e-9 for found in (jvp, vjp, product, operator))
    assert run.backends[0] == ("graph" if name == "flag in a tensor" else "traced")


def test_changes_are_not_seen_by_the_outputs_alone() -> None:
    """These changes leave z as it is: nothing but the graph or what surrounds it can tell."""
    for name in ("settings in a dataclass", "factor of a custom backward", "flag in a tensor", "backward hook"):
        build, change = CHANGES[name]
        KEEP[0] = 1.0
        torch.manual_seed(3)
        model, x = build().to(DOUBLE), randn(5, 3)
        before, slope = model(x), torch.autograd.grad(model(x).sum(), next(model.parameters()))[0]
        change(model)
        after = model(x)
        assert torch.allclose(before, after)
        assert not torch.allclose(slope, torch.autograd.grad(after.sum(), next(model.parameters()))[0])


@pytest.mark.parametrize("backend", ["auto", "graph"])
@pytest.mark.parametrize("hook", [lambda g: 0.5 * g, lambda g: g.clamp(-0.01, 0.01)], ids=["halves", "clips"])
def test_hooks_on_parameters_change_the_gradient_and_not_the_curvature(
    backend: str, hook: Callable[[Tensor], Tensor]
) -> None:
    products: list[Tensor] = []
    for hooked_parameters in (False, True):
        torch.manual_seed(3)
        model, x, y = mlp(3, 4, 2), randn(6, 3), randn(6, 2)
        optimizer = HessianFree(model.parameters(), linearization=backend, preconditioner=Identity())
        handles = [p.register_hook(hook) for p in model.parameters() if hooked_parameters]

        def closure(
            optimizer: HessianFree = optimizer, model: nn.Module = model, x: Tensor = x, y: Tensor = y
        ) -> Tensor:
            optimizer.zero_grad()
            loss = F.mse_loss(model(x), y)
            loss.backward()
            return loss

        with watched(lambda curvature, *_: products.append(curvature.operator @ vector(26, 4))):
            optimizer.step(closure)
        assert optimizer.last_step is not None
        assert optimizer.last_step.backend == ("traced" if backend == "auto" else "graph")
        assert all(p._backward_hooks for p in model.parameters()) == hooked_parameters == bool(handles)
    assert error(products[1], products[0]) <= 1e-13


@pytest.mark.parametrize("backend", ["auto", "graph"])
def test_an_operator_of_old_parameters_ends_in_an_error(backend: str) -> None:
    torch.manual_seed(3)
    model = mlp(3, 4, 2)
    j = linearize(model, randn(5, 3), backend=backend)
    for product in (lambda: j.jvp(randn(26)), lambda: j.vjp(randn(10))):
        product()
    with torch.no_grad():
        model[2].weight.mul_(2)
    for product in (lambda: j.jvp(randn(26)), lambda: j.vjp(randn(10)), lambda: j.vjps(randn(2, 10))):
        with pytest.raises(RuntimeError, match="written into|modified by an inplace operation"):
            product()


def test_an_operator_in_eval_mode_keeps_its_statistics_or_says_that_it_cannot() -> None:
    torch.manual_seed(3)
    model, v = normed().to(DOUBLE).eval(), randn(34)
    j = linearize(model, randn(5, 3))
    assert j.name == "traced"
    before = j.jvp(v)
    model[1].running_var.mul_(3)
    try:
        after = j.jvp(v)
    except RuntimeError as error:
        assert "written into" in str(error)
    else:
        assert torch.equal(after, before)


def test_default_dtype_and_precision_of_the_model() -> None:
    """A factory call in forward follows the default dtype; `model.float()` makes new parameters of the old ones."""
    torch.manual_seed(3)
    model = Between(lambda _, h: (h + torch.full((4,), 0.1)).tanh()).to(DOUBLE)
    run = Run(Case(lambda: model, rows(6, 3), values(6, 2)), model)
    run.step(0)
    torch.set_default_dtype(DOUBLE)
    try:
        run.step(1)
    finally:
        torch.set_default_dtype(torch.float32)
    run.step(2)
    assert all(found <= 1e-9 for errors in run.errors for found in (errors[0], errors[1], errors[2]))
    assert run.backends == ["traced"] * 3


def test_a_batch_made_in_inference_mode_ends_in_an_error_of_torch() -> None:
    model = mlp(3, 4, 2)
    run = Run(Case(lambda: model, rows(6, 3), values(6, 2)), model)
    run.step(0)
    with torch.inference_mode():
        x = randn(6, 3)

    def closure() -> Tensor:
        run.optimizer.zero_grad()
        loss = F.mse_loss(model(x), randn(6, 2))
        loss.backward()
        return loss

    with pytest.raises(RuntimeError, match="[Ii]nference tensors"):
        run.optimizer.step(closure)
