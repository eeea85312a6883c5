"""J(x₁)J(x₂)ᵀ, without J(x₁) or J(x₂).

For a function f from `[P]` to `[Z]` with Jacobian J `[Z, P]`, the Gram matrix K = J(x₁)J(x₂)ᵀ is `[Z, Z]`, small where
f has few outputs, although each J has Z·P numbers. Column i of K is J(x₁)(J(x₂)ᵀeᵢ): pull the unit vector eᵢ back, push
the result forward.

    direct      form both J, multiply: 2·Z·P numbers held, Z²·P multiply-adds
    indirect    one Jᵀu and one Jv a column, and nothing held

Part "note": f(x) = √(Mx/N) with M `[5, N]`, N = 10 000, for which J(x) = diag(1/2f(x)) M/N in closed form, and so
K = D₁ M Mᵀ D₂.

For a network and its parameters θ, K over a set of inputs is the tangent kernel, `[N·C, N·C]`; the linear system of
natural gradient descent in its dual form is K + λI. There a third way exists. A layer x ↦ Wx + b with inputs A
`[N, in]` and gradients S `[N·C, out]` at what it returns contributes (S Sᵀ) ∘ (A Aᵀ + 1), and K is the sum over layers:

    products    N·C times Jᵀu and Jv
    jacobian    J formed by C backward passes, then a product: N·C·P numbers
    layers      C backward passes, then small products: no J, (N·C)²·Σ(widths) multiply-adds

Part "networks" holds these forms of `hessfree.JacobianGram` against torch.func's direct recipe (vmap over jacrev, then
a contraction a layer). Part "regression" is a use: the posterior mean of a Gaussian process with ToyMLP's tangent
kernel, K(x*, x)(K(x, x) + σ²I)⁻¹y, against a mean, a linear fit and a radial kernel, whose width is the best of five
on the test points themselves; it is what wide networks converge to under gradient descent (Jacot et al. 2018).
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacfwd, jacrev, jvp, vjp, vmap

from experiments.models import ToyMLP
from experiments.studies import drawing
from experiments.studies.base import Form, Row, Scope, Study, UnavailableError
from experiments.studies.solve_forms import perceptron
from experiments.studies.text import error, markdown, memory, milliseconds, number
from hessfree import JacobianGram
from hessfree.operators.jacobian_gram import GramForm

DIRECT = "torch.func, direct"
_STYLES = {
    "layers": drawing.OURS,
    "jacobian": drawing.THIRD,
    "products": drawing.SECOND,
    DIRECT: drawing.GREY,
}


class _Note:
    """f(x) = √(Mx/N) at two points."""

    def __init__(self, scope: Scope, size: int) -> None:
        generator = scope.generator()
        self.matrix = torch.rand(5, size, generator=generator).to(scope.device)
        self.x1, self.x2 = (torch.rand(size, generator=generator).to(scope.device) for _ in range(2))

    def f(self, x: Tensor) -> Tensor:
        return (self.matrix @ x / self.matrix.shape[1]).sqrt()

    def direct(self, derivative: Callable[[Callable[[Tensor], Tensor]], Callable[[Tensor], Tensor]]) -> Tensor:
        jacobian = derivative(self.f)
        return jacobian(self.x1) @ jacobian(self.x2).T

    def closed(self) -> Tensor:
        left, right = (0.5 / self.f(x) / self.matrix.shape[1] for x in (self.x1, self.x2))
        return left.unsqueeze(1) * (self.matrix @ self.matrix.T) * right

    def truth(self) -> Tensor:
        twin = copy.copy(self)
        twin.matrix, twin.x1, twin.x2 = (t.cpu().double() for t in (self.matrix, self.x1, self.x2))
        return twin.closed()


def note(scope: Scope) -> Iterator[Row]:
    """The note's function, by both ways and in closed form."""
    for size in (100, 1000) if scope.quick else (1000, 10_000, 100_000):
        problem = _Note(scope, size)
        calls: dict[str, Callable[[], Tensor]] = {
            "direct, jacrev": partial(problem.direct, jacrev),
            "direct, jacfwd": partial(problem.direct, jacfwd),
            "indirect": _indirect(problem.f, problem.x1, problem.x2),
            "closed form": problem.closed,
        }
        needed = {"direct, jacfwd": 8 * size * size}
        forms = [Form(name, partial(_given, call), needed.get(name, 0)) for name, call in calls.items()]
        yield from scope.compare({"outputs": 5, "P": size}, forms, problem.truth, unit="indirect")


def _given(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    return call


def _indirect(f: Callable[[Tensor], Tensor], x1: Tensor, x2: Tensor) -> Callable[[], Tensor]:
    def call() -> Tensor:
        outputs, pull = vjp(f, x2)[:2]
        units = torch.eye(len(outputs), dtype=outputs.dtype, device=outputs.device)

        def column(unit: Tensor) -> Tensor:
            return jvp(f, (x1,), pull(unit))[1]

        return vmap(column, out_dims=1)(units)

    return call


def networks(scope: Scope) -> Iterator[Row]:
    """Kernels of perceptrons over the number of outputs and of parameters."""
    grid = [(32, 16, 1), (64, 24, 1)] if scope.quick else _GRID
    for width, samples, outputs in grid:
        generator = scope.generator()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(scope.seed)
            model = perceptron(4, width, width, outputs)().to(scope.device)
        x = scope.randn(generator, samples, 4)
        size = sum(p.numel() for p in model.parameters())
        rows, jacobian = samples * outputs, 4 * samples * outputs * size
        named = {name: p.detach() for name, p in model.named_parameters()}
        forms = [
            Form("layers", _ours(model, x, "layers"), 8 * rows**2),
            Form("jacobian", _ours(model, x, "jacobian"), 2 * jacobian + 8 * rows**2),
            Form("products", _ours(model, x, "products"), 8 * rows**2),
            Form(DIRECT, partial(_given, partial(_direct, model, named, x)), 2 * jacobian + 8 * rows**2),
        ]
        double = perceptron(4, width, width, outputs)().double()
        double.load_state_dict({name: p.cpu().double() for name, p in named.items()})
        exact = {name: p.detach() for name, p in double.named_parameters()}
        labels = {"P": size, "N": samples, "C": outputs, "R": rows}
        yield from scope.compare(labels, forms, partial(_direct, double, exact, x.cpu().double()), unit="layers")


# width, samples, outputs: rows of K at one network, then parameters at one number of rows, then several outputs
_GRID = (
    [(64, n, 1) for n in (64, 256, 1024, 2048)] + [(w, 256, 1) for w in (16, 256, 512)] + [(64, 128, c) for c in (2, 8)]
)


def _ours(model: nn.Module, x: Tensor, form: GramForm) -> Callable[[], Callable[[], Tensor]]:
    def call() -> Tensor:
        return JacobianGram.from_model(model, x, form=form).to_dense()

    def prepare() -> Callable[[], Tensor]:
        try:
            call()  # the trace is made once
        except ValueError as reason:
            raise UnavailableError(str(reason)) from reason
        return call

    return prepare


def _direct(model: nn.Module, named: dict[str, Tensor], x: Tensor) -> Tensor:
    """Contract the Jacobians of all samples, a parameter at a time: torch.func's tutorial on tangent kernels."""

    def one(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        return functional_call(model, parameters, (sample.unsqueeze(0),)).squeeze(0)

    tree = vmap(jacrev(one), (None, 0))(named, x)
    flat = [t.flatten(2).flatten(0, 1) for t in tree.values()]
    return torch.stack([j @ j.T for j in flat]).sum(0)


def regression(scope: Scope) -> Iterator[Row]:
    """Fit two frequencies from few noisy points by the tangent kernel of ToyMLP, and by simpler means."""
    generator = torch.Generator().manual_seed(scope.seed)
    train, points = (24, 60) if scope.quick else (200, 1000)
    x = 2 * torch.rand(train, 2, generator=generator) - 1
    x_test = 2 * torch.rand(points, 2, generator=generator) - 1
    y = _signal(x) + 0.1 * torch.randn(train, generator=generator)
    x, x_test, y = (t.to(scope.device) for t in (x, x_test, y))
    true = _signal(x_test)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(scope.seed)
        model = ToyMLP(2, out_dim=1, w=256).to(scope.device)
    size = sum(p.numel() for p in model.parameters())
    kernel, cross = JacobianGram.from_model(model, x), JacobianGram.from_model(model, x_test, x)
    with torch.no_grad():
        start, start_test = model(x).squeeze(1), model(x_test).squeeze(1)
    dense, across = kernel.to_dense(), cross.to_dense()
    tangent = start_test + across @ _ridge(dense, y - start)
    distances = torch.cdist(x, x).square()
    width = float(distances.flatten().median())
    candidates = [width * factor for factor in (0.02, 0.05, 0.1, 0.2, 0.5)]
    radial = [
        torch.exp(-torch.cdist(x_test, x).square() / w) @ _ridge(torch.exp(-distances / w), y) for w in candidates
    ]
    ones, ones_test = (torch.cat([t, torch.ones_like(t[:, :1])], 1) for t in (x, x_test))
    linear = ones_test @ torch.linalg.lstsq(ones.cpu(), y.cpu().unsqueeze(1)).solution.to(y).squeeze(1)
    found = {
        "mean": y.mean().expand_as(true),
        "linear": linear,
        "radial kernel, best of five widths": min(radial, key=lambda p: float((p - true).square().mean())),
        "tangent kernel of ToyMLP": tangent,
    }
    for name, prediction in found.items():
        rmse = float((prediction - true).square().mean().sqrt())
        yield {"form": name, "train": train, "P": size, "device": str(scope.device), "rmse": rmse, "noise": 0.1}
    scope.say(
        f"regression: {', '.join(f'{n} {float((p - true).square().mean().sqrt()):.3f}' for n, p in found.items())}"
    )


def _signal(x: Tensor) -> Tensor:
    return (3 * x[:, 0]).sin() + 0.5 * (4 * x[:, 1] * x[:, 0]).cos()


def _ridge(kernel: Tensor, y: Tensor) -> Tensor:
    """Return (K + σ²I)⁻¹y with the noise σ = 0.1, in float64 where the device has it."""
    dtype = kernel.dtype if kernel.device.type == "mps" else torch.float64
    matrix = kernel.to(dtype)
    matrix = matrix + 0.01 * torch.eye(len(y), dtype=dtype, device=y.device)
    return torch.linalg.solve(matrix, y.to(dtype)).to(y.dtype)


def table(rows: Sequence[Row]) -> str:
    """Arrange the parts one below the other."""
    blocks = []
    own = [row for row in rows if row["part"] == "note"]
    if own:
        header = ["P", "form", "median (quartiles), ms", "x indirect", "memory", "error"]
        lines = [
            [str(r["P"]), r["form"], milliseconds(r), number(r["ratio"]), memory(r), error(r)] for r in own
        ]  # fmt: skip
        blocks.append("f(x) = √(Mx/N), 5 outputs:\n\n" + markdown(header, lines))
    own = [row for row in rows if row["part"] == "networks"]
    if own:
        header = ["P", "N", "C", "form", "median (quartiles), ms", "x layers", "memory", "error"]
        lines = [
            [str(r["P"]), str(r["N"]), str(r["C"]), r["form"], milliseconds(r), number(r["ratio"]), memory(r), error(r)]
            for r in own
        ]
        blocks.append("4-w-w-C, tanh:\n\n" + markdown(header, lines))
    own = [row for row in rows if row["part"] == "regression"]
    if own:
        lines = [[row["form"], str(row["train"]), f"{row['rmse']:.3f}"] for row in own]
        blocks.append(markdown(["fit", "points", "root mean square error, of values of size about 0.8"], lines))
    return "\n\n".join(blocks)


def draw(path: Path, rows: Sequence[Row]) -> None:
    """Draw the note's function, time over rows and over parameters, and memory."""
    figure = drawing.new_figure(
        f"J(x₁)J(x₂)ᵀ without J{_finding(rows)}",
        "float32, medians; kernels of perceptrons 4-w-w-1, set-up at a new θ included",
        (12, 4.6),
    )
    axes = figure.subplots(1, 3)
    own = [row for row in rows if row["part"] == "networks" and row["C"] == 1]
    sizes = [row["P"] for row in own]
    common = max(set(sizes), key=sizes.count) if own else 0
    counts = [row["R"] for row in own if row["P"] != common]
    over_rows = [row for row in own if row["P"] == common]
    fixed = counts[0] if counts else 0
    over_size = sorted((row for row in own if row["R"] == fixed), key=lambda row: row["P"])
    panels = [
        (axes[0], over_rows, "R", "median_ms", 1.0, f"rows N·C, at P = {common}", "ms"),
        (axes[1], over_size, "P", "median_ms", 1.0, f"parameters P, at N·C = {fixed}", "ms"),
        (axes[2], over_size, "P", "peak_bytes", 1e6, f"parameters P, at N·C = {fixed}", "MB at its peak"),
    ]
    for axis, some, x, y, scale, across, up in panels:
        for form, colour in _STYLES.items():
            line = [row for row in some if row["form"] == form and row[y] is not None]
            if line:
                axis.plot(
                    [row[x] for row in line], [row[y] / scale for row in line], "o-", color=colour, label=form,
                    markersize=4,
                )  # fmt: skip
        if some:
            drawing.loglog(axis, across, up)
        drawing.plain(axis)
    axes[0].legend(frameon=False, fontsize=9)
    figure.savefig(path)


def _finding(rows: Sequence[Row]) -> str:
    """Say what layers save at the most parameters that were measured, against J of all samples."""
    own = [row for row in rows if row["part"] == "networks" and row["peak_bytes"] is not None]
    most = max((row["P"] for row in own if row["form"] == DIRECT), default=0)
    known = {row["form"]: row for row in own if row["P"] == most}
    if "layers" not in known:
        return ""
    time, held = (known[DIRECT][key] / known["layers"][key] for key in ("median_ms", "peak_bytes"))
    return f": by layers {number(time)}x sooner, with 1/{held:.0f} of the memory (P = {most})"


STUDY = Study(
    name="jacobian-gram",
    question="J(x1) J(x2)^T by both Jacobians, by products, or by layers?",
    parts={"note": note, "networks": networks, "regression": regression},
    table=table,
    draw=draw,
)
