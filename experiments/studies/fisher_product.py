"""JᵀJ v, from J or without it.

A network z = f(θ), z `[Z]` (N samples of C outputs, Z = N·C), has the Jacobian J `[Z, P]` in its P parameters. The
Fisher matrix of outputs with unit variance is F = JᵀJ `[P, P]`. A step of natural gradient, by conjugate gradients on
it, wants products F v only. There are three ways to one:

    (JᵀJ) v       form J, then F: Z·P² multiply-adds and P² numbers; each product P² more
    Jᵀ(J v)       form J: Z·P numbers; each product 2·Z·P
    on the fly    J v is one sweep through the layers, next to the activations; Jᵀu is one backward pass. For a
                  perceptron both take 2·N·P multiply-adds, the numbers held are activations, N times the widths.

By associativity all are equal, and the last needs no matrix at all. How J is formed matters too: pulled back row by
row, as `torch.func.jacrev` does on the batch, every one of Z rows takes a backward pass of all N samples, Z·N·P; for
samples that do not mix, one vectorised pass a sample (vmap over jacrev) takes Z·P.

"The script as written" is the answer that is found on forums: `torch.func.linearize` and `vjp`, called anew for each
product, so that the network is traced every time. hessfree linearises once for all products at one θ: "traced" replays
the operators of J and Jᵀ, from a trace made once and kept for all θ; "graph" is double backward on one live autograd
graph; "functional" is torch.func.linearize, once for all products. Every time below is for K products at a new θ, with
all that has to be done for the first of them; only the trace, which outlives θ, is made before.

Part "note": 4-64-64-1 with tanh (P = 4 545), 4096 samples, K = 1, 10, 50. Part "sizes": one product, perceptrons of
rising width with P from 10³ to 10⁷, 64 samples, to where the dense forms no longer fit. Errors are against float64.
"""

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.func import functional_call, jacrev, jvp, linearize, vjp, vmap

from experiments.studies import drawing
from experiments.studies.base import Form, Row, Scope, Study
from experiments.studies.solve_forms import perceptron
from experiments.studies.text import error, markdown, memory, milliseconds, number
from hessfree import GaussNewton

SCRIPT, TRACED = "script as written", "hessfree, traced"
ROWS, SAMPLES, MATRIX = "dense: J by rows", "dense: J by samples", "dense: JᵀJ formed"
CHUNK = 64  # rows that jacrev pulls back at a time
Parameters = dict[str, Tensor]


class _Problem:
    """A network, its inputs, and K vectors to multiply by; the answer is the last product."""

    def __init__(self, scope: Scope, widths: Sequence[int], samples: int, products: int) -> None:
        generator = scope.generator()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(scope.seed)
            self.model = perceptron(*widths)().to(scope.device)
        self.x = scope.randn(generator, samples, widths[0])
        self.named: Parameters = {name: p.detach() for name, p in self.model.named_parameters()}
        self.numels = [p.numel() for p in self.named.values()]
        self.size, self.outputs = sum(self.numels), samples * widths[-1]
        self.vectors = [scope.randn(generator, self.size) for _ in range(products)]
        hidden = samples * sum(widths[1:])
        one_pass = 4 * min(CHUNK, self.outputs) * hidden
        jacobian = 4 * self.outputs * self.size
        self.needed = {
            ROWS: 2 * jacobian + one_pass,
            SAMPLES: 2 * jacobian,
            MATRIX: 2 * jacobian + 4 * self.size**2,
        }

    def split(self, v: Tensor) -> Parameters:
        pieces = zip(self.named.items(), v.split(self.numels), strict=True)
        return {name: piece.view_as(p) for (name, p), piece in pieces}

    def flat(self, tree: Parameters, leading: int = 0) -> Tensor:
        return torch.cat([tree[name].flatten(leading) for name in self.named], leading)

    def run(self, parameters: Parameters) -> Tensor:
        return functional_call(self.model, parameters, (self.x,))

    def by_rows(self) -> Tensor:
        """J `[Z, P]`, a backward pass of the batch a row."""
        tree = jacrev(lambda p: self.run(p).flatten(), chunk_size=CHUNK)(self.named)
        return self.flat(tree, 1)

    def by_samples(self) -> Tensor:
        """J `[Z, P]`, a backward pass of one sample a row."""

        def one(parameters: Parameters, sample: Tensor) -> Tensor:
            return functional_call(self.model, parameters, (sample.unsqueeze(0),)).squeeze(0)

        tree = vmap(jacrev(one), (None, 0))(self.named, self.x)
        return self.flat({name: t.flatten(0, 1) for name, t in tree.items()}, 1)

    def last(self, product: Callable[[Tensor], Tensor]) -> Tensor:
        """Multiply every vector, and return the last product."""
        for v in self.vectors:
            found = product(v)
        return found

    def script(self, v: Tensor) -> Tensor:
        _, push = linearize(self.run, self.named)
        (product,) = vjp(self.run, self.named)[1](push(self.split(v)))
        return self.flat(product)

    def anew(self, v: Tensor) -> Tensor:
        along = jvp(self.run, (self.named,), (self.split(v),))[1]
        (product,) = vjp(self.run, self.named)[1](along)
        return self.flat(product)

    def truth(self) -> Tensor:
        """The last product in float64 on the CPU, by torch.func alone."""
        twin = copy.copy(self)
        twin.model, twin.x = copy.deepcopy(self.model).cpu().double(), self.x.cpu().double()
        twin.named = {name: p.detach() for name, p in twin.model.named_parameters()}
        return _warm(lambda: twin.anew(self.vectors[-1].cpu().double()), False)()()

    def forms(self) -> list[Form]:
        def dense(form: Callable[[], Tensor]) -> Tensor:
            jacobian = form()
            return self.last(lambda v: jacobian.T @ (jacobian @ v))

        def matrix() -> Tensor:
            jacobian = self.by_samples()
            fisher = jacobian.T @ jacobian
            return self.last(lambda v: fisher @ v)

        calls: dict[str, Callable[[], Tensor]] = {
            ROWS: lambda: dense(self.by_rows),
            SAMPLES: lambda: dense(self.by_samples),
            MATRIX: matrix,
            SCRIPT: lambda: self.last(self.script),
            "jvp + vjp anew": lambda: self.last(self.anew),
            "hessfree, functional": lambda: self.ours("functional"),
            "hessfree, graph": lambda: self.ours("graph"),
            TRACED: lambda: self.ours("traced"),
        }
        return [Form(name, _warm(call, "hessfree" in name), self.needed.get(name, 0)) for name, call in calls.items()]

    def ours(self, backend: str) -> Tensor:
        operator = GaussNewton.from_model(self.model, self.x, linearization=backend)
        return self.last(operator.matvec)


def _warm(call: Callable[[], Tensor], once: bool) -> Callable[[], Callable[[], Tensor]]:
    """Return what hands out `call`, perhaps after one call: a trace is made once for all θ."""

    def quiet() -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.func speaks of torch.jit, and linearize of its own constants
            return call()

    def prepare() -> Callable[[], Tensor]:
        if once:
            quiet()
        return quiet

    return prepare


def note(scope: Scope) -> Iterator[Row]:
    """K products on the note's own model."""
    samples = 256 if scope.quick else 4096
    for products in (1, 10) if scope.quick else (1, 10, 50):
        problem = _Problem(scope, (4, 64, 64, 1), samples, products)
        labels = {"products": products, "N": samples, "P": problem.size}
        # J by rows takes the same half a minute for any number of products
        forms = [form for form in problem.forms() if products == 1 or form.name != ROWS]
        yield from scope.compare(labels, forms, problem.truth, unit=TRACED)


def sizes(scope: Scope) -> Iterator[Row]:
    """One product, for networks of rising width."""
    widths = (24, 80) if scope.quick else (24, 80, 256, 800, 3160)
    for width in widths:
        problem = _Problem(scope, (8, width, width, 4), 64, 1)
        labels = {"products": 1, "N": 64, "P": problem.size}
        yield from scope.compare(labels, problem.forms(), problem.truth, unit=TRACED)


def table(rows: Sequence[Row]) -> str:
    """Arrange both parts, a row a form."""
    blocks = []
    for part, heading in (("note", "4-64-64-1, tanh"), ("sizes", "8-w-w-4, tanh")):
        own = [row for row in rows if row["part"] == part]
        if own:
            header = ["P", "N", "products", "form", "median (quartiles), ms", "x traced", "memory", "error"]
            blocks.append(f"{heading}:\n\n" + markdown(header, [_line(row) for row in own]))
    found = speedups(rows)
    if found:
        words = "; ".join(f"{what}: {ratio:.0f}x" for what, ratio in found)
        blocks.append(f"One product on the note's model, over {TRACED}: {words}.")
    slopes = [f"{form} {slope:.2f}" for form, slope in _slopes(rows).items()]
    if slopes:
        blocks.append(f"Slopes of log time over log P, from the second size on: {', '.join(slopes)}.")
    return "\n\n".join(blocks)


def speedups(rows: Sequence[Row]) -> list[tuple[str, float]]:
    """Return how much longer one product took than the traced one on the note's model, by form."""
    own = [row for row in rows if row["part"] == "note" and row["products"] == 1]
    return [(row["form"], row["ratio"]) for row in own if row["ratio"] is not None and row["form"] != TRACED]


def _slopes(rows: Sequence[Row]) -> dict[str, float]:
    slopes = {}
    for form in dict.fromkeys(row["form"] for row in rows):
        own = [row for row in rows if row["part"] == "sizes" and row["form"] == form and row["median_ms"] is not None]
        if len(own) >= 3:
            size, time = (numpy.log([row[key] for row in own[1:]]) for key in ("P", "median_ms"))
            slopes[form] = float(numpy.polyfit(size, time, 1)[0])
    return slopes


def _line(row: Row) -> list[str]:
    head = [str(row["P"]), str(row["N"]), str(row["products"]), row["form"]]
    return [*head, milliseconds(row), number(row["ratio"]), memory(row), error(row)]


_STYLES: dict[str, tuple[str, str]] = {
    ROWS: (drawing.THIRD, "-"),
    SAMPLES: (drawing.THIRD, "--"),
    MATRIX: (drawing.FIFTH, "-"),
    SCRIPT: (drawing.GREY, "-"),
    "jvp + vjp anew": (drawing.GREY, "--"),
    "hessfree, functional": (drawing.SECOND, ":"),
    "hessfree, graph": (drawing.SECOND, "-"),
    TRACED: (drawing.OURS, "-"),
}


def draw(path: Path, rows: Sequence[Row]) -> None:
    """Draw the note's model as bars, and time and memory over P."""
    ratios = dict(speedups(rows))
    gain = "without a dense J"
    if ROWS in ratios and SAMPLES in ratios:
        gain = f"{number(ratios[ROWS])}x sooner than from J by rows, {number(ratios[SAMPLES])}x than from J by samples"
    figure = drawing.new_figure(
        f"JᵀJ v on the fly: {gain}",
        "a product at a new θ with its set-up; float32, medians; dense forms end where they do not fit",
        (12, 6.4),
    )
    grid = figure.add_gridspec(2, 2, width_ratios=[1.1, 1])
    note_axis = figure.add_subplot(grid[:, 0])
    own = [row for row in rows if row["part"] == "note" and row["products"] == 1]
    known = [row["median_ms"] for row in own if row["median_ms"] is not None]
    note_axis.set_xscale("log")
    if known:
        note_axis.set_xlim(0.4 * min(known), 12 * max(known))
        drawing.bars(
            note_axis,
            [row["form"] for row in own],
            [row["median_ms"] for row in own],
            [_STYLES[row["form"]][0] for row in own],
            [f"{number(row['median_ms'])} ms ({number(row['ratio'])}x)" if row["median_ms"] else "none" for row in own],
        )
        note_axis.set_xlabel("ms")
        drawing.plain(note_axis, f"one product, 4-64-64-1 with tanh, {own[0]['N']} samples", grid="x")
    time_axis, memory_axis = figure.add_subplot(grid[0, 1]), figure.add_subplot(grid[1, 1])
    _lines(time_axis, rows, "median_ms", 1.0)
    _lines(memory_axis, rows, "peak_bytes", 1e6)
    drawing.loglog(time_axis, "", "ms")
    drawing.loglog(memory_axis, "P", "MB at its peak")
    drawing.plain(time_axis, "over the number of parameters, 64 samples of 4 outputs")
    drawing.plain(memory_axis)
    time_axis.legend(frameon=False, fontsize=7.5, loc="center left", bbox_to_anchor=(1.0, 0.0))
    figure.savefig(path)


def _lines(axis: Any, rows: Sequence[Row], key: str, scale: float) -> None:
    for form, (colour, style) in _STYLES.items():
        own = [row for row in rows if row["part"] == "sizes" and row["form"] == form and row[key] is not None]
        if own:
            axis.plot(
                [row["P"] for row in own], [row[key] / scale for row in own], style, color=colour, label=form,
                marker="o", markersize=3.5, linewidth=1.6,
            )  # fmt: skip


STUDY = Study(
    name="fisher-product",
    question="JᵀJ v from a dense Jacobian, or on the fly?",
    parts={"note": note, "sizes": sizes},
    table=table,
    draw=draw,
)
