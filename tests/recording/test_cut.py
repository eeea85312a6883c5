"""Where the network ends: found from the outermost call inward, checked, and found again at once."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hessfree.operators import GaussNewton
from hessfree.recording import (
    CallTree,
    Cut,
    CutPlace,
    Owners,
    Recording,
    call_at,
    explains_gradient,
    find_cut,
    make_cut,
    mark_outputs,
    record,
)
from hessfree.vectors import ParameterVector
from tests.architectures import Checkpointed, ConvNet, Wrapper, classes, mlp, randn
from tests.networks import PROBLEMS, make
from tests.operators.test_gauss_newton import built
from tests.oracle import at, error, recorded


def record_loss(model: nn.Module, closure: Callable[[], Any]) -> tuple[Recording, ParameterVector]:
    parameters = ParameterVector([p for p in model.parameters() if p.requires_grad])
    tree = CallTree(Owners(parameters), parameters.device, lambda _: True, lambda _: True)
    return record(closure, parameters, tree), parameters


def cut_of(model: nn.Module, closure: Callable[[], Any], given: nn.Module | None = None) -> Cut:
    recording, parameters = record_loss(model, closure)
    cut = make_cut(recording, parameters, find_cut(recording, parameters, given))
    assert explains_gradient(cut, recording, parameters)
    return cut


def shapes(cut: Cut) -> list[tuple[int, ...]]:
    return [tuple(o.shape) for o in cut.outputs]


@pytest.mark.parametrize("name", PROBLEMS)
def test_found_and_explains_the_gradient(name: str) -> None:
    problem = make(name)
    recording, parameters = recorded(problem), problem.parameters
    place = find_cut(recording, parameters)
    assert (place.words, place.warning) == (problem.cut, None)
    cut = make_cut(recording, parameters, place)
    assert shapes(cut) == [tuple(z.shape) for z in problem.outputs()]
    assert cut.tail.has_direct == problem.direct
    assert explains_gradient(cut, recording, parameters)
    assert all(call_at(recording.roots, path) in cut.calls for path in place.paths)
    # the next recording of the same structure is cut at once
    torch.manual_seed(0)
    again = recorded(problem)
    assert again.signature() == recording.signature()
    assert find_cut(again, parameters) == place


def test_a_wrong_cut_does_not_explain_the_gradient() -> None:
    problem = make("regularised_code")
    recording, parameters = recorded(problem), problem.parameters
    right = find_cut(recording, parameters)
    assert len(right.places) == 2
    for change in (lambda g: None, lambda g: 1.001 * g, lambda g: g * float("nan")):
        cut = make_cut(recording, parameters, right)
        assert explains_gradient(cut, recording, parameters)
        cut.tail.gradients[0] = change(cut.tail.gradients[0])
        assert not explains_gradient(cut, recording, parameters)


def test_a_backward_that_is_no_derivative_still_explains_itself() -> None:
    """A straight-through estimator is linear in its own way: J is what its backward says."""

    class Round(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.round()

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return g

    net = mlp(3, 4, 2)
    cut = cut_of(net, lambda: F.mse_loss(Round.apply(net(randn(5, 3))), randn(5, 2)))
    assert shapes(cut) == [(5, 2)]


@pytest.mark.parametrize("loss_fn", [F.l1_loss, lambda z, y: (z * y).sum()])
def test_a_loss_linear_in_the_outputs_has_no_cut_and_says_so(loss_fn: Callable[[Tensor, Tensor], Tensor]) -> None:
    net, x, y = mlp(3, 4, 2), randn(5, 3), randn(5, 2)
    recording, parameters = record_loss(net, lambda: loss_fn(net(x), y))
    place = find_cut(recording, parameters)
    assert place.places == ()
    assert place.words == "none: exact Hessian"
    assert "linear in the outputs of the modules (as an L1 loss is)" in str(place.warning)
    assert "mark_outputs" in str(place.warning)


def test_an_l1_loss_gets_the_exact_hessian_with_one_warning() -> None:
    problem = make("mean_squared_error")
    problem.forward = lambda: F.l1_loss(problem.model(problem.inputs), problem.targets)
    operator, cut, said = built(problem)
    assert cut == "none: exact Hessian"
    assert len(said) == 1
    flat = torch.cat([p.detach().flatten() for p in problem.model.parameters()])
    dense = torch.autograd.functional.hessian(lambda t: at(problem, t, problem.forward), flat)
    assert error(operator.to_dense(), dense) <= 1e-10


def test_a_loss_linear_in_the_parameters() -> None:
    net = mlp(3, 2)
    recording, parameters = record_loss(net, lambda: net(randn(5, 3)).sum())
    assert "no curvature" in str(find_cut(recording, parameters).warning)


def test_no_module_at_all() -> None:
    theta = nn.ParameterList([torch.ones(3, dtype=torch.float64)])
    recording, parameters = record_loss(theta, lambda: (theta[0] ** 4).sum())
    place = find_cut(recording, parameters)
    assert "calls no module that owns the parameters" in str(place.warning)
    cut = cut_of(theta, lambda: (mark_outputs(theta[0] ** 2) ** 2).sum())
    assert (cut.place.words, shapes(cut)) == ("mark_outputs", [(3,)])


# --- what modules return ---------------------------------------------------------------------------------------------


class Returning(nn.Module):
    """A network that returns what `shape` makes of its output and its hidden state."""

    def __init__(self, shape: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.body, self.head, self.shape = mlp(3, 4), mlp(4, 2), shape

    def forward(self, x: Tensor) -> Any:
        h = torch.tanh(self.body(x))
        return self.shape(self.head(h), h)


@dataclasses.dataclass
class Opaque:
    z: Tensor


def test_a_tensor_returned_twice_is_one_output() -> None:
    net, x, y = Returning(lambda z, h: {"last": z, "states": [h, z], "view": z}), randn(5, 3), randn(5, 2)
    cut = cut_of(net, lambda: F.mse_loss(net(x)["states"][1], y))
    assert shapes(cut) == [(5, 2)]
    assert not cut.tail.has_direct


def test_objects_that_hide_their_tensors_are_looked_into() -> None:
    net, x, y = Returning(lambda z, h: Opaque(z)), randn(5, 3), randn(5, 2)
    cut = cut_of(net, lambda: F.mse_loss(net(x).z, y))
    assert shapes(cut) == [(5, 2)]
    assert cut.place.words == "outputs of Sequential"


def test_complex_outputs_are_looked_behind() -> None:
    net, x, y = Returning(lambda z, h: torch.fft.fft(z)), randn(5, 3), randn(5, 2)
    cut = cut_of(net, lambda: (net(x).abs() - y).square().mean())
    assert shapes(cut) == [(5, 2)]
    with pytest.raises(ValueError, match="view_as_real"):
        mark_outputs([torch.ones(2, dtype=torch.complex64)])


def test_a_part_of_the_loss_among_the_outputs_is_looked_behind() -> None:
    """A variational network that returns its own divergence: cut there, its curvature would be lost."""
    net, x, y = Returning(lambda z, h: (z, h.square().mean())), randn(5, 3), randn(5, 2)

    def closure() -> Tensor:
        z, penalty = net(x)
        return F.mse_loss(z, y) + penalty

    assert shapes(cut_of(net, closure)) == [(5, 4), (5, 2)]


def test_an_output_that_is_overwritten_through_a_view() -> None:
    net, x, y = Returning(lambda z, h: z.view(10)), randn(5, 3), randn(10)

    def closure() -> Tensor:
        z = net(x)
        z[:3] = 0
        return F.mse_loss(z, y)

    cut = cut_of(net, closure)
    assert shapes(cut) == [(5, 2)]  # the view that was returned is no longer on the way to the loss; its base is


def test_numbers_none_and_strings_among_the_outputs() -> None:
    net, x, y = Returning(lambda z, h: ("name", None, 3, {"z": z}, [z.detach()])), randn(5, 3), randn(5, 2)
    assert shapes(cut_of(net, lambda: F.mse_loss(net(x)[3]["z"], y))) == [(5, 2)]


# --- how modules are called ------------------------------------------------------------------------------------------


def test_calls_under_no_grad_and_detached_targets_are_legal() -> None:
    net, x = mlp(3, 4, 3), randn(5, 3)

    def closure() -> Tensor:
        with torch.no_grad():
            target = net(x + 1)
        return F.mse_loss(net(x), target + net(x).detach())

    assert shapes(cut_of(net, closure)) == [(5, 3)]


def test_wrappers_are_transparent() -> None:
    net = mlp(3, 4, 2)
    wrapper, x, y = Wrapper(Wrapper(net)), randn(5, 3), randn(5, 2)
    assert cut_of(wrapper, lambda: F.mse_loss(wrapper(x), y)).place.words == "outputs of Wrapper"

    class Trainer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
            return {"loss": F.mse_loss(self.net(x), y)}

    trainer = Wrapper(Trainer())
    assert cut_of(trainer, lambda: trainer(x, y)["loss"]).place.words == "outputs of Sequential"


def test_a_model_can_be_named() -> None:
    pair, x, y = nn.Sequential(mlp(3, 4), nn.Tanh(), mlp(4, 2)), randn(5, 3), randn(5, 2)
    cut = cut_of(pair, lambda: F.mse_loss(pair(x), y), given=pair[2])
    assert shapes(cut) == [(5, 2)]
    assert [call.module for call in cut.calls] == [pair[2]]
    recording, parameters = record_loss(pair, lambda: F.mse_loss(pair(x), y))
    place = find_cut(recording, parameters, mlp(1, 1))
    assert "does not call the Sequential that was given as model" in str(place.warning)


def test_a_linear_head_beside_a_curved_one() -> None:
    actor, critic = mlp(3, 4, 2), mlp(3, 4, 1)
    both, x, y = nn.ModuleList([actor, critic]), randn(5, 3), randn(5, 2)
    cut = cut_of(both, lambda: F.mse_loss(actor(x), y) + critic(x).mean())
    assert shapes(cut) == [(5, 2), (5, 1)]


def test_marks_count_beside_modules() -> None:
    """A physics-informed loss with a boundary term: residual marked, boundary values found."""
    net, points, boundary = mlp(1, 4, 1), randn(6, 1), randn(2, 1)

    def closure() -> Tensor:
        x = points.clone().requires_grad_()
        (slope,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
        residual = mark_outputs(slope - x)
        return residual.square().mean() + net(boundary).square().mean()

    cut = cut_of(net, closure)
    assert cut.place.words == "mark_outputs + outputs of Sequential"
    assert shapes(cut) == [(6, 1), (2, 1)]
    assert cut.calls == ()
    assert not cut.tail.has_direct


def test_marks_that_the_loss_does_not_use_change_nothing() -> None:
    net, x, y = mlp(3, 4, 2), randn(5, 3), randn(5, 2)

    def closure() -> Tensor:
        mark_outputs((net[0](x), torch.ones(2), net(x).detach()))
        return F.mse_loss(net(x), y)

    assert cut_of(net, closure).place.words == "outputs of Sequential"


def test_several_backward_calls_have_one_cut() -> None:
    net, x, y = mlp(3, 4, 2), randn(6, 3), randn(6, 2)

    def closure() -> Tensor:
        losses = [F.mse_loss(net(x[i : i + 2]), y[i : i + 2]) / 3 for i in (0, 2, 4)]
        for loss in losses:
            loss.backward()
        return sum(losses)

    recording, parameters = record_loss(net, closure)
    cut = make_cut(recording, parameters, find_cut(recording, parameters))
    assert shapes(cut) == [(2, 2)] * 3
    assert explains_gradient(cut, recording, parameters)
    whole = GaussNewton.from_loss(net, F.mse_loss, x, y).to_dense()
    problem = make("mean_squared_error")
    problem.model, problem.closure = net, closure
    operator, _, _ = built(problem)
    assert error(operator.to_dense(), whole) <= 1e-12


# --- checkpoints, compiled modules ------------------------------------------------------------------------------------


def test_a_reentrant_checkpoint_names_its_cure() -> None:
    model, x, y = Checkpointed(use_reentrant=True).double(), randn(5, 3), randn(5, 2)
    recording, parameters = record_loss(model, lambda: F.mse_loss(model(x), y))
    with pytest.raises(RuntimeError, match="use_reentrant=True.*pass use_reentrant=False"):
        find_cut(recording, parameters)
    with pytest.raises(RuntimeError, match="pass use_reentrant=False"):
        GaussNewton.from_loss(model, F.mse_loss, x, y)


def test_a_checkpoint_records_each_call_once() -> None:
    problem = make("checkpointed")
    recording = recorded(problem)
    (root,) = recording.roots
    assert [type(call.module).__name__ for call in root.children] == ["Linear", "Sequential", "Linear"]


def test_a_compiled_module_runs_eagerly() -> None:
    net, x, y = ConvNet(), randn(4, 1, 4, 4).float(), classes(4, high=3)
    compiled = torch.compile(net, backend="eager")
    assert "torch._dynamo" in sys.modules
    eager = GaussNewton.from_loss(net, F.cross_entropy, x, y).to_dense()
    cut = cut_of(compiled, lambda: F.cross_entropy(compiled(x), y))
    assert cut.place.words == "outputs of OptimizedModule"
    assert error(GaussNewton.from_loss(compiled, F.cross_entropy, x, y).to_dense(), eager) <= 1e-6


def test_a_place_is_plain_data() -> None:
    place = CutPlace((((0, 1), 0), (None, 2)), "words")
    assert place.paths == frozenset({(0, 1)})
