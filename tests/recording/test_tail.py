"""The loss behind the outputs: derivatives with z held as a variable."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hessfree.recording import Output, Tail
from tests.architectures import randn
from tests.oracle import error


class Echo(torch.autograd.Function):
    """Hands on zeros where nothing flows, as custom functions do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * g * ctx.saved_tensors[0]


class Chain:
    """theta -> z0 -> z1 -> loss(z0, z1, theta[1]), by hand."""

    def __init__(self) -> None:
        self.theta = [nn.Parameter(randn(3, seed=i)) for i in (1, 2, 3)]
        self.z0 = torch.sin(self.theta[0] * self.theta[1])
        self.z1 = Echo.apply(self.z0 * 2) + self.theta[2]
        self.outputs = Output.all_of([self.z0, self.z1])
        self.loss = self.ell(self.z0, self.z1, self.theta[1])
        self.tail = Tail(self.loss, self.outputs, self.theta)

    @staticmethod
    def ell(z0: Tensor, z1: Tensor, t: Tensor) -> Tensor:
        return (z0 * z1.exp()).sum() + (t**3 * z0).sum() + z1.square().sum()


def test_first_derivatives_hold_the_other_outputs() -> None:
    chain = Chain()
    leaves = [t.detach().requires_grad_() for t in (chain.z0, chain.z1, chain.theta[1])]
    expected = torch.autograd.grad(Chain.ell(*leaves), leaves)
    found = [*chain.tail.gradients, chain.tail.direct[1]]
    assert all(error(f.detach(), e) <= 1e-14 for f, e in zip(found, expected, strict=True) if f is not None)
    assert [t is None for t in chain.tail.direct] == [True, False, True]
    assert chain.tail.has_direct
    assert chain.tail.coupled
    assert not chain.tail.linear


def test_products_are_those_of_the_joint_hessian() -> None:
    chain = Chain()
    point = torch.cat([chain.z0.detach(), chain.z1.detach(), chain.theta[1].detach()])
    dense = torch.autograd.functional.hessian(lambda a: Chain.ell(*a.split(3)), point)
    w, v = [randn(3, seed=5), randn(3, seed=6)], [randn(3, seed=7 + i) for i in range(3)]
    full = dense @ torch.cat([*w, v[1]])
    z, theta = chain.tail.product(w, v)
    assert error(torch.cat([z[0], z[1], theta[1]]), full) <= 1e-13
    assert theta[0] is None
    assert theta[2] is None
    only_z, _ = chain.tail.product(w)
    assert error(torch.cat(only_z), (dense @ torch.cat([*w, torch.zeros(3)]))[:6]) <= 1e-13
    _, only_theta = chain.tail.product(None, v)
    assert error(only_theta[1], (dense @ torch.cat([torch.zeros(6), v[1]]))[6:]) <= 1e-13


def test_a_custom_function_that_hands_on_zeros_is_no_direct_use() -> None:
    theta = nn.Parameter(randn(3))
    z = Echo.apply(theta * 2)
    tail = Tail((z**3).sum(), Output.all_of(z), [theta])
    assert tail.direct == [None]
    assert not tail.has_direct
    assert not tail.coupled


def test_outputs_that_the_loss_reaches_only_through_others_count_as_unused() -> None:
    theta = nn.Parameter(randn(3))
    a = theta.sin()
    b = a.cos()
    tail = Tail(b.square().sum(), Output.all_of([a, b]), [theta])
    assert tail.gradients[0] is None
    assert tail.product([randn(3), randn(3)])[0][0] is None


def test_one_node_with_two_outputs() -> None:
    theta = nn.Parameter(randn(4, 3))
    left, right = theta.sin().unbind(0)[:2]
    tail = Tail((left**2 * right).sum(), Output.all_of([left]), [theta])
    assert tail.gradients[0] is not None
    assert error(tail.gradients[0].detach(), (2 * left * right).detach()) <= 1e-15
    # what flows through the other output of the node is a direct use, and only that
    expected = torch.zeros(4, 3, dtype=torch.float64)
    expected[1] = (left**2 * theta[1].cos()).detach()
    assert tail.direct[0] is not None
    assert error(tail.direct[0].detach(), expected) <= 1e-15


def test_linear_and_uncoupled_losses() -> None:
    theta = nn.Parameter(randn(3))
    z = theta.sin()
    linear = Tail(z.sum() + theta.sum(), Output.all_of(z), [theta])
    assert linear.linear
    assert not linear.coupled
    assert linear.product([randn(3)], [randn(3)]) == ([None], [None])
    penalty = Tail(z.square().sum() + theta.pow(4).sum(), Output.all_of(z), [theta])
    assert penalty.has_direct
    assert not penalty.coupled


def test_a_loss_that_is_itself_an_output() -> None:
    theta = nn.Parameter(randn(3))
    loss = theta.square().sum()
    tail = Tail(loss, Output.all_of(loss), [theta])
    assert float(tail.gradients[0]) == 1
    assert not tail.has_direct
    assert tail.product([torch.ones((), dtype=torch.float64)])[0] == [None]


def test_products_leave_no_hooks_on_the_graph() -> None:
    chain = Chain()
    chain.tail.product([randn(3), randn(3)], [randn(3)] * 3)
    whole = torch.autograd.grad(chain.loss, chain.theta, retain_graph=True)
    assert all(float(g.norm()) > 0 for g in whole)  # nothing stops the flow any more


def test_parameters_moved_to_another_dtype_stay_on_the_graph() -> None:
    net = nn.Linear(2, 1).double()
    tail = Tail(net(randn(3, 2)).square().sum(), (), list(net.parameters()))
    v = [randn(1, 2), randn(1)]
    before = tail.product(None, v)[1]
    net.float()
    assert all(torch.equal(a, b) for a, b in zip(before, tail.product(None, v)[1], strict=True))
