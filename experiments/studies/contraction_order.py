"""(AB)C or A(BC): one product, two orders, and a factor between them that no autograd looks for.

A product of matrices is associative, its cost is not. A `[n, n]`, B `[n, m]`, C `[m, 1]`: (AB)C takes n·n·m + n·m
multiply-adds, A(BC) takes n·m + n·n. For n = 100, m = 10 that is 101 000 against 11 000 (200 900 and 21 800 additions
and multiplications). Autograd differentiates what was written, in the order in which it was written: the derivative of
(AB)C holds AB `[n, m]`, and pulls a cotangent back through it at the same cost. Nothing reorders. `cheapest_order` asks
opt_einsum for the order before anything is multiplied.

A kernel that is an outer product, K = u vᵀ `[k, k]`, is the same question: K * X is k² multiply-adds a pixel, and
u * (vᵀ * X) is 2k.

And so is a step of natural gradient descent. For J `[R, P]` (R samples times outputs, P parameters)

    (JᵀJ + λI)⁻¹ g                 P×P:   R·P² to form, P³/3 to factor
    Jᵀ (JJᵀ + λI)⁻¹ ..., g         R×R:   R²·Σ(widths of layers) to form, for J itself is never needed, R³/3 to factor
    products Jᵀ(J v), k of them    4·N·P multiply-adds each, and no matrix

are one answer. Which is cheapest follows from P, N, the outputs and the widths of the layers: `hessfree.AutoSolver`
decides by these numbers alone. Its constants were fitted to nine perceptrons; the table holds its choice against the
clock on networks of other kinds.

Parts: "orders", "separable", "fitted" (the nine), "validation" and "further" (the others). Peak memory is
that of one call.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from experiments.contraction import cheapest_order, count
from experiments.studies import drawing, solve_forms
from experiments.studies.base import Answer, Form, Row, Scope, Study
from experiments.studies.text import error, markdown, memory, milliseconds, number

LEFT, RIGHT = "(AB)C", "A(BC)"
FORWARD, BACKWARD = "forward", "forward + backward"
_COLOURS = {"cg": drawing.OURS, "dense": drawing.THIRD, "gram": drawing.SECOND}
_WORDS = {"cg": "products: CG", "dense": "JᵀJ: dense", "gram": "JJᵀ: Gram"}


def orders(scope: Scope) -> Iterator[Row]:
    """Multiply A `[n, n]`, B `[n, n/10]`, C `[n/10, 1]` in both orders, and differentiate both."""
    for n in (100, 200) if scope.quick else (100, 256, 512, 1024, 2048, 4096):
        generator, m = scope.generator(), n // 10
        shapes = [(n, n), (n, m), (m, 1)]
        chain = [scope.randn(generator, *shape) for shape in shapes]
        cotangent, best = scope.randn(generator, n, 1), cheapest_order(shapes)
        for passes in (FORWARD, BACKWARD):
            forms = [Form(order, _product(order, chain, cotangent if passes == BACKWARD else None)) for order in _ORDER]
            forms.append(Form("torch.linalg.multi_dot", _product("", chain, cotangent if passes == BACKWARD else None)))
            rows = scope.compare({"passes": passes, "n": n}, forms, _truth(chain, cotangent, passes), unit=RIGHT)
            for row in rows:
                counted = count(row["form"], shapes) if row["form"] in _ORDER else best
                yield row | {"flops": counted.flops, "multiply_adds": counted.multiply_adds, "cheapest": best.words}


_ORDER: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    LEFT: lambda a, b, c: (a @ b) @ c,
    RIGHT: lambda a, b, c: a @ (b @ c),
}


def _product(order: str, chain: Sequence[Tensor], cotangent: Tensor | None) -> Callable[[], Callable[[], Answer]]:
    def prepare() -> Callable[[], Answer]:
        function = _ORDER.get(order, lambda *matrices: torch.linalg.multi_dot(matrices))
        if cotangent is None:
            return lambda: function(*chain)
        leaves = [matrix.clone().requires_grad_() for matrix in chain]
        return lambda: torch.autograd.grad(function(*leaves), leaves, cotangent)

    return prepare


def _truth(chain: Sequence[Tensor], cotangent: Tensor, passes: str) -> Callable[[], Answer]:
    def exact() -> Answer:
        a, b, c = (matrix.cpu().double() for matrix in chain)
        if passes == FORWARD:
            return a @ (b @ c)
        u = cotangent.cpu().double()
        return u @ (b @ c).T, (a.T @ u) @ c.T, b.T @ (a.T @ u)

    return exact


def separable(scope: Scope) -> Iterator[Row]:
    """Filter an image `[1, 1, s, s]` with K = u vᵀ `[k, k]`, whole and as two filters."""
    side = 64 if scope.quick else 512
    for k in (3, 7) if scope.quick else (3, 7, 15, 31):
        generator = scope.generator()
        image = scope.randn(generator, 1, 1, side, side)
        u, v = scope.randn(generator, k), scope.randn(generator, k)
        kernel, column, line = torch.outer(u, v)[None, None], u.view(1, 1, k, 1), v.view(1, 1, 1, k)
        forms = [
            Form("K * X", _filtered(image, kernel)),
            Form("u * (vᵀ * X)", _filtered(image, line, column)),
        ]
        exact = _filtered(image.cpu().double(), kernel.cpu().double())()
        rows = scope.compare({"k": k, "side": side}, forms, exact, unit="u * (vᵀ * X)")
        out = side - k + 1
        for row in rows:
            yield row | {"multiply_adds": out * out * k * k if row["form"] == "K * X" else out * k * (side + out)}


def _filtered(image: Tensor, *kernels: Tensor) -> Callable[[], Callable[[], Tensor]]:
    def call() -> Tensor:
        x = image
        for kernel in kernels:
            x = F.conv2d(x, kernel)
        return x

    return lambda: call


def fitted(scope: Scope) -> Iterator[Row]:
    """Time the networks that the cost model was fitted to."""
    yield from solve_forms.measure(scope, {} if scope.quick else solve_forms.FITTED)


def validation(scope: Scope) -> Iterator[Row]:
    """Time networks that the cost model has not seen, the first half."""
    yield from solve_forms.measure(scope, solve_forms.QUICK if scope.quick else _half(0))


def further(scope: Scope) -> Iterator[Row]:
    """Time the second half."""
    yield from solve_forms.measure(scope, {} if scope.quick else _half(1))


def _half(which: int) -> dict[str, solve_forms.Case]:
    cases = list(solve_forms.VALIDATION.items())
    middle = len(cases) // 2
    return dict(cases[middle:] if which else cases[:middle])


def verdicts(rows: Sequence[Row]) -> list[tuple[Row, float | None]]:
    """Return the row of the chosen form of each network, and its time over the best form's."""
    found = []
    for row in rows:
        if row.get("chosen"):
            known = row["median_ms"] is not None and row["best_ms"]
            found.append((row, row["median_ms"] / row["best_ms"] if known else None))
    return found


def table(rows: Sequence[Row]) -> str:
    """Arrange the parts one below the other."""
    blocks = []
    chains = [row for row in rows if row["part"] == "orders"]
    if chains:
        header = ["n", "passes", "order", "multiply-adds", "flops", "median (quartiles), ms", "x A(BC)", "error"]
        blocks.append(markdown(header, [_chain_line(row) for row in chains]))
        blocks.append(f"The order that cheapest_order gives: {chains[0]['cheapest']} at every size.")
    filters = [row for row in rows if row["part"] == "separable"]
    if filters:
        header = ["k", "form", "multiply-adds", "median (quartiles), ms", "ratio", "memory", "error"]
        lines = [
            [
                str(row["k"]), row["form"], str(row["multiply_adds"]), milliseconds(row), number(row["ratio"]),
                memory(row), error(row),
            ]
            for row in filters
        ]  # fmt: skip
        blocks.append(markdown(header, lines))
    for part, names in _STEPS.items():
        steps = [row for row in rows if row["part"] in names]
        if steps:
            header = ["network", "P", "N·C", "form", "median (quartiles), ms", "expected, ms", "memory", ""]
            blocks.append(f"Networks of the part {part}:\n\n" + markdown(header, [_step_line(row) for row in steps]))
            blocks.append(_summary(part, steps))
    return "\n\n".join(blocks)


_STEPS = {"fitted": ("fitted",), "validation": ("validation", "further")}


def _summary(part: str, steps: Sequence[Row]) -> str:
    ratios = [ratio for _, ratio in verdicts(steps)]
    good = sum(ratio is not None and ratio <= solve_forms.WITHIN for ratio in ratios)
    return f"{part}: the chosen form is within {solve_forms.WITHIN}x of the best in {good} of {len(ratios)}."


def _chain_line(row: Row) -> list[str]:
    counts = [str(row["multiply_adds"]), str(row["flops"])] if row["passes"] == FORWARD else ["", ""]
    return [str(row["n"]), row["passes"], row["form"], *counts, milliseconds(row), number(row["ratio"]), error(row)]


def _step_line(row: Row) -> list[str]:
    mark = "chosen" if row["chosen"] else ""
    if row["median_ms"] is not None and row["median_ms"] == row["best_ms"]:
        mark = f"{mark}, best" if mark else "best"
    expected = row.get("expected_ms")
    return [
        row["model"], str(row["P"]), str(row["R"]), _WORDS[row["form"]], milliseconds(row), number(expected),
        memory(row) if row.get("peak_bytes") is not None or row.get("needed_bytes") else "-", mark,
    ]  # fmt: skip


def draw(path: Path, rows: Sequence[Row]) -> None:
    """Draw the orders on the left, and each network's three forms with the choice on the right."""
    steps = [row for row in rows if row["part"] in _STEPS["validation"]]
    chosen = verdicts(steps)
    good = sum(ratio is not None and ratio <= solve_forms.WITHIN for _, ratio in chosen)
    title = "One product, several orders: the cheap one can be told before"
    figure = drawing.new_figure(
        title, "medians and, for the chains, quartiles; float32; see table.md for the machine's times", (11, 6.2)
    )
    left, right = figure.subplots(1, 2, width_ratios=[1, 1.35])
    _draw_orders(left, [row for row in rows if row["part"] == "orders" and row["passes"] == FORWARD])
    names = list(dict.fromkeys(row["model"] for row in steps))
    for row in steps:
        if row["median_ms"] is None:
            continue
        place = names.index(row["model"])
        right.plot(row["median_ms"] / row["best_ms"], place, "o", color=_COLOURS[row["form"]], markersize=8, zorder=3)
        if row["chosen"]:
            right.plot(
                row["median_ms"] / row["best_ms"], place, "o", markersize=15, fillstyle="none", color=drawing.INK
            )
    for form, colour in _COLOURS.items():
        right.plot([], [], "o", color=colour, label=_WORDS[form])
    right.plot([], [], "o", markersize=13, fillstyle="none", color=drawing.INK, label="AutoSolver's choice")
    right.axvline(1, color="#999999", linewidth=0.8)
    right.set_xscale("log")
    right.set_xlabel("time of one damped step, over the best form's")
    right.set_yticks(range(len(names)), names)
    right.set_ylim(len(names) - 0.4, -0.6)
    right.legend(frameon=False, fontsize=8, loc="lower right")
    drawing.plain(right, f"JᵀJ, JJᵀ or products: within {solve_forms.WITHIN}x in {good} of {len(chosen)}", grid="x")
    figure.savefig(path)


def _draw_orders(axis: Any, chains: Sequence[Row]) -> None:
    for form, colour in ((LEFT, drawing.SECOND), (RIGHT, drawing.OURS), ("torch.linalg.multi_dot", drawing.GREY)):
        own = [row for row in chains if row["form"] == form]
        style = "o-" if form in _ORDER else "x:"
        if own:
            axis.plot([row["n"] for row in own], [row["median_ms"] for row in own], style, color=colour, label=form)
            axis.fill_between(
                [row["n"] for row in own], *zip(*(row["quartiles_ms"] for row in own), strict=True), color=colour,
                alpha=0.2,
            )  # fmt: skip
    if chains:
        drawing.loglog(axis, "n, for [n, n] · [n, n/10] · [n/10, 1]", "ms")
        axis.legend(frameon=False, fontsize=9)
    drawing.plain(axis, "(AB)C against A(BC)")


STUDY = Study(
    name="contraction-order",
    question="(AB)C or A(BC), JᵀJ or JJᵀ: which order is cheapest, and can it be told beforehand?",
    parts={"orders": orders, "separable": separable, "fitted": fitted, "validation": validation, "further": further},
    table=table,
    draw=draw,
    extras=("opt_einsum",),
)
