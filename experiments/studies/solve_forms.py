"""Networks on which the three forms of a damped Gauss-Newton step are timed, and what the cost model says of them."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from experiments.benchmark.products.networks import ConvNet
from experiments.models import ToyMLP
from experiments.studies.base import Form, Row, Scope
from hessfree import CG, AutoSolver, GaussNewton
from hessfree.solvers import Solver

ITERATIONS = 50
AUTO = AutoSolver(cg=CG(max_iterations=ITERATIONS, progress=None))
SOLVERS: dict[str, Solver] = {"cg": AUTO.cg, "dense": AUTO.dense, "gram": AUTO.gram}
DAMPING = 0.1
WITHIN = 1.3  # of the best form's time

Build = Callable[[], nn.Module]
Loss = Callable[[Tensor, Tensor], Tensor]
Case = tuple[Build, tuple[int, ...], Loss]


def perceptron(*widths: int, activation: Callable[[], nn.Module] = nn.Tanh) -> Build:
    """Return what builds a perceptron of these widths."""

    def build() -> nn.Module:
        layers: list[nn.Module] = []
        for i, o in zip(widths, widths[1:], strict=False):
            layers += [nn.Linear(i, o), activation()]
        return nn.Sequential(*layers[:-1])

    return build


def squares(z: Tensor, noise: Tensor) -> Tensor:
    """Return the mean squared error against random targets."""
    return F.mse_loss(z, noise.view_as(z))


def cross_entropy(z: Tensor, noise: Tensor) -> Tensor:
    """Return the cross-entropy against random classes."""
    return F.cross_entropy(z, noise.view_as(z).argmax(1))


class _Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 48), nn.Linear(48, 4)
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(48), nn.Linear(48, 48), nn.GELU()) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x)
        return self.last(x)


# what the constants of the cost model were fitted to: three widths, three numbers of samples, one kind of network
FITTED: dict[str, Case] = {
    f"4-{w}-{w}-1, N {n}": (perceptron(4, w, w, 1), (n, 4), squares) for w in (8, 24, 96) for n in (64, 512, 2048)
}
# and what it was not: other depths, widths, outputs, activations, losses, layers
VALIDATION: dict[str, Case] = {
    "velocity field 2-D, N 256": (lambda: ToyMLP(2, time_varying=True), (256, 3), squares),
    "velocity field 2-D, N 1024": (lambda: ToyMLP(2, time_varying=True), (1024, 3), squares),
    "velocity field 64-D, N 64": (lambda: ToyMLP(64, time_varying=True), (64, 65), squares),
    "velocity field 784-D, N 8": (lambda: ToyMLP(784, time_varying=True), (8, 785), squares),
    "4-64-64-1, N 4096": (perceptron(4, 64, 64, 1), (4096, 4), squares),
    "logistic 20-5, N 4096": (perceptron(20, 5), (4096, 20), cross_entropy),
    "classifier 64-32-10, N 256": (perceptron(64, 32, 10, activation=nn.ReLU), (256, 64), cross_entropy),
    "2-12-12-1, N 8192": (perceptron(2, 12, 12, 1), (8192, 2), squares),
    "wide 10-512-512-1, N 128": (perceptron(10, 512, 512, 1, activation=nn.ReLU), (128, 10), squares),
    "residual 8-48(4)-4, N 128": (_Residual, (128, 8), squares),
    "convolutions 3x16x16, N 16": (lambda: ConvNet((8, 16), side=16, classes=10), (16, 3, 16, 16), cross_entropy),
    "deep 6-32(8)-3, N 200": (perceptron(6, *[32] * 8, 3, activation=nn.SELU), (200, 6), squares),
}
QUICK: dict[str, Case] = {
    "2-8-1, N 512": (perceptron(2, 8, 1), (512, 2), squares),
    "3-48-48-1, N 48": (perceptron(3, 48, 48, 1), (48, 3), squares),
    "3-40-40-2, N 1024": (perceptron(3, 40, 40, 2), (1024, 3), squares),
}


def measure(scope: Scope, cases: Mapping[str, Case]) -> Iterator[Row]:
    """Time one damped step in each form at a new θ, for a gradient as right-hand side: linearise, then solve.

    (A product lets the graph go that rows of J come from, so that an operator serves one step.)

    A form that is expected to take a second, and a hundred times as long as the best, is left out and said to be.

    Args:
        scope: Where.
        cases: The networks.

    Yields:
        A row a form and network, with `expected_ms` by the cost model, `chosen` and `best`.
    """
    for name, (build, shape, loss) in cases.items():
        generator = scope.generator()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(scope.seed)
            model = build().to(scope.device)
        x = scope.randn(generator, *shape)
        with torch.no_grad():
            noise = scope.randn(generator, model(x).numel())
        build_operator = partial(GaussNewton.from_loss, model, loss, x, noise)
        operator = build_operator()
        work = operator.work()
        expected = AUTO.expected_seconds(work)
        rhs = -operator.parameters.flatten(torch.autograd.grad(loss(model(x), noise), operator.parameters.params))
        forms, missing = [], []
        for form, solver in SOLVERS.items():
            if form in expected and (expected[form] < 1 or expected[form] < 100 * min(expected.values())):
                call = _solving(solver, build_operator, rhs, warm=expected[form] < 1)
                forms.append(Form(form, call, _bytes(form, work.size, work.rows)))
            else:
                why = (
                    f"left out: {expected[form]:.1f} s expected"
                    if form in expected
                    else "above the form's limit of size"
                )
                missing.append((form, why))
        labels = {"model": name, "P": work.size, "R": work.rows, "N": work.samples}
        rows = scope.compare(labels, forms)
        best = min((row["median_ms"] for row in rows if row["median_ms"] is not None), default=None)
        chosen = min(expected, key=lambda form: expected[form])
        for row in rows:
            row |= {"expected_ms": 1e3 * expected[row["form"]], "chosen": row["form"] == chosen, "best_ms": best}
            yield row
        for form, why in missing:
            blank = dict.fromkeys(rows[0]) | labels | {"form": form, "device": str(scope.device), "reason": why}
            yield blank | {"chosen": form == chosen, "best_ms": best}


def _solving(
    solver: Solver, build: Callable[[], GaussNewton], rhs: Tensor, warm: bool
) -> Callable[[], Callable[[], Tensor]]:
    def call() -> Tensor:
        return solver.solve(build(), rhs, DAMPING).value

    def prepare() -> Callable[[], Tensor]:
        if warm:
            call()  # buffers that outlive a step
        return call

    return prepare


def _bytes(form: str, size: int, rows: int) -> int:
    """Return what a form holds: two matrices and a factor."""
    return {"dense": 4 * (3 * size**2 + rows * size), "gram": 12 * rows**2}.get(form, 0)
