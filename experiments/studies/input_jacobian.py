"""The Jacobian of a velocity network in its input: one row at a time, or all at once; and Jv against Jᵀv.

A velocity field v(x, t) takes a batch x `[B, D]` to z `[B, D']`, row by row. All derivatives together are an array
`[B, D', B, D]`, zero but where both samples are the same: what is wanted is the batch Jacobian `[B, D', D]`,

    J_b[i, j] = ∂z_b[i] / ∂x_b[j].

Reverse mode gives Jᵀu for a cotangent u `[B, D']`: in torch, `torch.autograd.grad(z, x, grad_outputs=u)` is
Σ_bi u_b[i] ∂z_b[i]/∂x, one number a component of x. With u one-hot at (b, i) that is row i of J_b, and B·D' such calls,
the double loop, make the batch Jacobian. With u = 1 in all rows it is the sum of the rows of every J_b, and no
gradient of anything that was asked for. Since samples do not mix, u may be e_i for all samples at once: D' calls, the
single loop. `hessfree.jacobian.batch_jacobian` makes these in one, as a matrix of cotangents under vmap, or the
columns J_b e_j by forward mode where D < D'.

Forward mode gives Jv `[B, D']` for a tangent v `[B, D]`: `torch.func.jvp`, or `hessfree.jacobian.batch_jvp`. Where
D' = D, Jv and Jᵀv have the same shape, and nothing fails when one is taken for the other; but they are equal for every
v only if J is symmetric, which the Jacobian of a network is not. A comparison of the two prints False, and so does one
of J v with J v of another draw of the weights or of the inputs, even where both are right.
"""

import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import jvp

from experiments.environment import UsageError, choose_device
from experiments.models import ToyMLP
from experiments.studies import input_jacobian_shown
from experiments.studies.base import Answer, Form, Row, Scope, Study, relative_error
from experiments.studies.input_jacobian_shown import DOUBLE_LOOP, FORWARD, OURS, SINGLE_LOOP
from hessfree.jacobian import batch_jacobian, batch_jvp, batch_vjp

_DIM = 784
_BATCHES = {3: 3, 32: 8, 256: 16}  # samples, and with --quick
_COMPARED = 1  # samples whose Jacobians are held against float64
_LOOPED = 1  # samples of a larger batch that the double loop goes through: all take up to minutes
_SHOWN = 300  # components of Jv that the picture shows


def _network(scope: Scope, seed: int = 0) -> ToyMLP:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = ToyMLP(dim=32 if scope.quick else _DIM, time_varying=True, n_hidden=3, w=input_jacobian_shown.WIDTH)
    return net.to(scope.device)


def _inputs(scope: Scope, count: int, dim: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return scope.randn(generator, count, dim), torch.rand(count, 1, generator=generator).to(scope.device)


def _chain_rule(net: ToyMLP, x: Tensor, t: Tensor) -> Tensor:
    """Return J `[B, D', D]` in float64 by multiplying the layers' own Jacobians, without any automatic derivative."""
    h = torch.cat([x, t], 1).detach().cpu().double()
    product = torch.eye(h.shape[1], dtype=h.dtype).expand(len(h), -1, -1)[:, :, :-1]
    for layer in net.net:
        if isinstance(layer, nn.Linear):
            weight = layer.weight.detach().cpu().double()
            h, product = h @ weight.T + layer.bias.detach().cpu().double(), weight @ product
        else:
            alpha, scale = 1.6732632423543772, 1.0507009873554805  # of SELU (Klambauer et al. 2017)
            slope = torch.where(h > 0, scale, scale * alpha * h.exp())
            h, product = torch.where(h > 0, scale * h, scale * alpha * h.expm1()), slope[:, :, None] * product
    return product


def _double_loop(net: ToyMLP, x: Tensor, t: Tensor, count: int) -> Tensor:
    """Return J of the first samples, a reverse pass a row: B·D' of them."""
    x = x.detach().requires_grad_()
    z = net(x, t)
    jacobian = x.new_empty(count, z.shape[1], x.shape[1])
    for b in range(count):
        for i in range(z.shape[1]):
            jacobian[b, i] = torch.autograd.grad(z[b, i], x, retain_graph=True)[0][b]
    return jacobian


def _single_loop(net: ToyMLP, x: Tensor, t: Tensor) -> Tensor:
    """Return J, a reverse pass an output for all samples at once: D' of them."""
    x = x.detach().requires_grad_()
    z = net(x, t)
    rows = [torch.autograd.grad(z[:, i].sum(), x, retain_graph=True)[0] for i in range(z.shape[1])]
    return torch.stack(rows, 1)


def _all_at_once(net: ToyMLP, x: Tensor, t: Tensor, mode: Any) -> Tensor:
    with torch.no_grad():  # or the result would have a graph that reaches the parameters
        return batch_jacobian(net, x, t, mode=mode)


def _loops(batch: int, scope: Scope) -> Iterator[Row]:
    """Measure the ways to the batch Jacobian."""
    batch = _BATCHES[batch] if scope.quick else batch
    net = _network(scope)
    x, t = _inputs(scope, batch, net.dim)
    count = batch if batch == min(_BATCHES) else _LOOPED
    labels = {"measured": "Jacobian", "B": batch, "D": net.dim, "samples": batch}

    def form(name: str, function: Callable[[], Answer]) -> Form:
        return Form.of(name, function, 4 * batch * net.dim**2, counts_memory=name not in {DOUBLE_LOOP, SINGLE_LOOP})

    others = [
        form(SINGLE_LOOP, lambda: _single_loop(net, x, t)),
        form(OURS, lambda: _all_at_once(net, x, t, "auto")),
        form(FORWARD, lambda: _all_at_once(net, x, t, "forward")),
    ]
    loop = form(DOUBLE_LOOP, lambda: _double_loop(net, x, t, count))

    def truth() -> Answer:
        return _chain_rule(net, x[:_COMPARED], t[:_COMPARED])

    def first(answer: Answer) -> Answer:
        assert isinstance(answer, Tensor)
        return answer[:_COMPARED]

    if count == batch:
        rows = scope.compare(labels, [loop, *others], truth, unit=OURS, compared=first)
    else:  # rows cost the same, one by one: the time of all is that of some, times B over these
        part = scope.compare(labels | {"samples": count}, [loop], truth, compared=first)
        rows = [*part, *scope.compare(labels, others, truth, unit=OURS, compared=first)]
    base = next(row["median_ms"] for row in rows if row["form"] == OURS)
    for row in rows:
        row["whole_ms"] = None if row["median_ms"] is None else row["median_ms"] * batch / row["samples"]
        row["over_ours"] = None if row["whole_ms"] is None or not base else row["whole_ms"] / base
        yield row


def _false(scope: Scope) -> Iterator[Row]:
    """Compare Jv with what it was taken for."""
    net, other = _network(scope), _network(scope, seed=1)
    (x, t), (x2, t2) = (_inputs(scope, 3, net.dim, seed) for seed in (0, 1))
    v = scope.randn(scope.generator(), 3, net.dim)

    def dense(net: ToyMLP, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return Jv and Jᵀv through the dense Jacobian in float64."""
        jacobian, vector = _chain_rule(net, x, t), v.cpu().double()
        return torch.einsum("bij,bj->bi", jacobian, vector), torch.einsum("bij,bi->bj", jacobian, vector)

    with warnings.catch_warnings():  # a process's first jvp scripts some decompositions, which is deprecated
        warnings.filterwarnings("ignore", message=".*torch.jit.*")
        forward = jvp(lambda x: net(x, t), (x,), (v,))[1]
    leaf = x.clone().requires_grad_()
    reverse = torch.autograd.grad(net(leaf, t), leaf, v)[0]
    jv, pulled = dense(net, x, t)
    pairs = {
        "J v by jvp = Jᵀ v by grad_outputs=v, same net, same x": (forward, reverse),
        "J v by jvp = J v, dense": (forward, jv),
        "J v by batch_jvp = J v, dense": (batch_jvp(net, x, v, t)[1], jv),
        "Jᵀ v by grad_outputs=v = Jᵀ v, dense": (reverse, pulled),
        "Jᵀ v by batch_vjp = Jᵀ v, dense": (batch_vjp(net, x, v, t)[1], pulled),
        "J v = J v of a second net, same x": (forward, dense(other, x, t)[0]),
        "J v = J v of the same net at a second x": (forward, dense(net, x2, t2)[0]),
    }
    for name, (one, two) in pairs.items():
        difference = relative_error(one, two.detach().cpu().double())
        close = torch.allclose(one.detach().cpu().double(), two.detach().cpu().double(), rtol=1e-4, atol=1e-6)
        row: Row = {"measured": "comparison", "name": name, "equal": close, "difference": difference}
        if "grad_outputs=v, same net" in name:
            row |= {"jv": forward[0, :_SHOWN].tolist(), "pulled": reverse[0, :_SHOWN].tolist()}
        scope.say(f"{name}: {close}, relative difference {difference:.1e}")
        yield row


def _example(x: Tensor) -> Tensor:
    """Return the rows (x₁x₂, x₂ + x₃², x₁) of rows (x₁, x₂, x₃)."""
    return torch.stack([x[:, 0] * x[:, 1], x[:, 1] + x[:, 2] ** 2, x[:, 0]], 1)


def _grad_outputs(scope: Scope) -> Iterator[Row]:
    """Show what `grad_outputs` selects, on two samples of three components."""
    x = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], device=scope.device, requires_grad=True)
    jacobian: Any = torch.autograd.functional.jacobian(_example, x.detach())  # [2, 3, 2, 3]
    choices = {
        "one-hot at sample 0, output 1: that row of J": torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 0.0]]),
        "output 1 of all samples: that row of each J": torch.tensor([[0.0, 1.0, 0.0], [0.0, 1.0, 0.0]]),
        "ones: the sum of all rows of each J": torch.ones(2, 3),
        "u: rows weighed by u, Jᵀu": torch.tensor([[1.0, -1.0, 2.0], [0.5, 0.0, 1.0]]),
    }
    for name, u in choices.items():
        u = u.to(x)
        found = torch.autograd.grad(_example(x), x, grad_outputs=u)[0]
        yield {
            "measured": "grad_outputs",
            "name": name,
            "grad_outputs": u.tolist(),
            "result": found.tolist(),
            "error": relative_error(found, torch.einsum("bi,bicj->cj", u, jacobian).cpu().double()),
            "jacobian": jacobian.reshape(6, 6).tolist(),
        }


def _devices(scope: Scope) -> Iterator[Row]:
    """Time the note's forwards, and a Jacobian, on every device that there is; name the others."""
    calls = 20 if scope.quick else 500
    for name in ("cpu", "cuda", "mps"):
        labels = {"measured": "device", "name": name}
        try:
            device = choose_device(name)
        except UsageError:
            scope.say(f"{name}: absent")
            yield labels | {"form": f"{calls} forwards of Linear(1000, 1000)", "median_ms": None, "reason": "absent"}
            continue
        there = Scope(device, scope.room, scope.quick, scope.seed, scope.say)
        net = _network(there)
        x, t = _inputs(there, 8 if scope.quick else 32, net.dim)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            linear = nn.Linear(1000, 1000).to(device)
        rows = there.randn(there.generator(), 1000, 1000)

        def forwards(linear: nn.Linear = linear, rows: Tensor = rows) -> Tensor:
            with torch.no_grad():
                for _ in range(calls):
                    z = linear(rows)
            return z

        jacobian = partial(_all_at_once, net, x, t, "auto")
        forms = [
            Form.of(f"{calls} forwards of Linear(1000, 1000)", forwards),
            Form.of(f"batch Jacobian, B {len(x)}, D {net.dim}", jacobian),
        ]
        yield from there.compare(labels, forms)


STUDY = Study(
    name="input-jacobian",
    question="The Jacobian of a velocity network in its input: a double loop, or all rows at once?",
    parts={
        **{f"batch-{batch}": partial(_loops, batch) for batch in _BATCHES},
        "false": _false,
        "grad-outputs": _grad_outputs,
        "devices": _devices,
    },
    table=input_jacobian_shown.table,
    draw=input_jacobian_shown.draw,
)
