"""The derivative of AᵀA, by its closed form, by autograd, and as a dense Jacobian.

For A `[m, n]` the map A ↦ AᵀA `[n, n]` has the differential dAᵀA + AᵀdA. With ⟨X, Y⟩ = tr(XᵀY), a cotangent B `[n, n]`
is pulled back to

    ⟨B, dAᵀA + AᵀdA⟩ = ⟨A Bᵀ + A B, dA⟩,   B ↦ A(B + Bᵀ) `[m, n]`.

The sum B + Bᵀ costs n² additions, the product 2mn² flops. Autograd does not know that the two matrices it multiplies
are one: it computes A Bᵀ and A B, 4mn² flops, keeps both `[m, n]` and adds them. For AB, A `[m, n]`, B `[n, p]`, the
closed form C ↦ (CBᵀ, AᵀC) is what autograd does too: nothing is to be gained, and nothing should be lost.

The dense Jacobian of AᵀA is a matrix `[n·n, m·n]` for each matrix of a batch, `[b·n·n, b·m·n]` for the batch as
`torch.autograd.functional.jacobian` sees it. It exists at the sizes of the first part, where all ways agree; at the
others its bytes are all that can be shown. That a product with a Jacobian never needs the Jacobian is what the whole
package stands on.

Forms: "closed form" is the formula above; "hessfree" the autograd Functions `hessfree.matmul.gram` and `matmul`, which
a loss can be built on; "autograd" `torch.autograd.grad` on the plain product; "torch.func.vjp" and
"autograd.functional.vjp" torch's functional ways. The latter has no backward alone. Peak memory is that of one call
above what it was given (A, the cotangent, and for a backward alone what the forward pass kept).
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.functional import jacobian
from torch.autograd.functional import vjp as functional_vjp
from torch.func import jacrev, vjp, vmap

from experiments.studies import drawing
from experiments.studies.base import Answer, Form, Row, Scope, Study
from experiments.studies.room import in_words
from experiments.studies.text import error, markdown, memory, milliseconds, number
from hessfree.matmul import gram, matmul

BACKWARD, BOTH = "backward alone", "forward + backward"
_UNIT = "autograd"
_COMPARED = 8  # matrices of a batch whose derivatives are held against float64
_SMALL = ((1, 10, 5), (1, 8, 6, 4))
_SIZES = {"gram": (256, 1024, 100), "gram-large": (512, 2048, 200), "matmul": (512, 200, 2048, 200)}
_QUICK = {"gram": (8, 32, 10), "gram-large": (4, 64, 16), "matmul": (4, 10, 32, 10)}
_COLOURS = {
    "closed form": drawing.THIRD,
    "hessfree": drawing.OURS,
    "autograd": drawing.GREY,
    "torch.func.vjp": drawing.GREY,
    "autograd.functional.vjp": drawing.GREY,
}


def _plain_gram(a: Tensor) -> Tensor:
    return a.mT @ a


def _plain_matmul(a: Tensor, b: Tensor) -> Tensor:
    return a @ b


def _closed_gram(b: Tensor, a: Tensor) -> Answer:
    return (a @ (b + b.mT),)


def _closed_matmul(c: Tensor, a: Tensor, b: Tensor) -> Answer:
    return c @ b.mT, a.mT @ c


class _Problem:
    """One product at one size.

    Attributes:
        matrices: What is multiplied.
        cotangent: What is pulled back.
    """

    def __init__(self, scope: Scope, size: Sequence[int]) -> None:
        """Draw the matrices of b, m, n or of b, m, n, p."""
        generator = scope.generator()
        batch, m, n, *rest = size
        columns = rest[0] if rest else n
        self.is_gram = not rest
        self.labels: Row = {"product": "AᵀA" if self.is_gram else "AB"} | dict(zip("bmnp", size, strict=False))
        shapes = [(batch, m, n)] + [(batch, n, p) for p in rest]
        self.matrices = [scope.randn(generator, *shape).requires_grad_() for shape in shapes]
        self.cotangent = scope.randn(generator, batch, n if self.is_gram else m, columns)
        self.plain: Callable[..., Tensor] = _plain_gram if self.is_gram else _plain_matmul
        self.ours: Callable[..., Tensor] = gram if self.is_gram else matmul
        self.closed: Callable[..., Answer] = _closed_gram if self.is_gram else _closed_matmul

    def truth(self) -> Answer:
        """Return the derivatives by autograd in float64, of the first matrices of the batch."""
        matrices = [one.detach()[:_COMPARED].cpu().double().requires_grad_() for one in self.matrices]
        return torch.autograd.grad(self.plain(*matrices), matrices, self.cotangent[:_COMPARED].cpu().double())

    def closed_form(self) -> Answer:
        """Return the derivatives by their formulas, and nothing else."""
        with torch.no_grad():
            return self.closed(self.cotangent, *self.matrices)

    def dense_bytes(self, per_sample: bool) -> int:
        """Return the bytes of the dense Jacobians in all matrices."""
        batch = len(self.cotangent)
        rows, columns = self.cotangent.numel(), sum(one.numel() for one in self.matrices)
        return 4 * rows * columns // (batch if per_sample else 1)

    def backward(self, function: Callable[..., Tensor]) -> Form:
        """Return the form whose forward pass is off the clock."""

        def prepare() -> Callable[[], Answer]:
            z = function(*self.matrices)
            return lambda: torch.autograd.grad(z, self.matrices, self.cotangent, retain_graph=True)

        return Form("hessfree" if function is self.ours else _UNIT, prepare)

    def both(self, function: Callable[..., Tensor]) -> Form:
        """Return the form with its forward pass."""

        def call() -> Answer:
            return torch.autograd.grad(function(*self.matrices), self.matrices, self.cotangent)

        return Form.of("hessfree" if function is self.ours else _UNIT, call)

    def functional(self, backward_alone: bool) -> list[Form]:
        """Return torch's functional ways."""
        matrices = [one.detach() for one in self.matrices]

        def pull() -> Callable[[], Answer]:
            found: Any = vjp(self.plain, *matrices)
            return lambda: found[1](self.cotangent)

        def old() -> Answer:
            found = functional_vjp(self.plain, tuple(matrices), self.cotangent)[1]
            return (found,) if isinstance(found, Tensor) else found

        if backward_alone:
            return [Form("torch.func.vjp", pull)]
        return [
            Form.of("torch.func.vjp", lambda: pull()()),
            Form.of("autograd.functional.vjp", old),
        ]

    def dense(self) -> list[Form]:
        """Return the dense Jacobians: of the whole batch, and at the least of each sample."""

        def whole() -> Answer:
            found: Any = jacobian(self.plain, tuple(one.detach() for one in self.matrices))
            flat = self.cotangent.flatten()
            rows = [one.reshape(len(flat), -1).T @ flat for one in found]
            return [row.reshape(one.shape) for row, one in zip(rows, self.matrices, strict=True)]

        def samples() -> Answer:
            matrices = [one.detach() for one in self.matrices]
            blocks = vmap(jacrev(self.plain, tuple(range(len(matrices)))))(*matrices)
            flat = self.cotangent.flatten(1)
            rows = [torch.einsum("bo,boi->bi", flat, one.reshape(*flat.shape, -1)) for one in blocks]
            return [row.reshape(one.shape) for row, one in zip(rows, matrices, strict=True)]

        return [
            Form.of("dense Jacobian", whole, self.dense_bytes(False)),
            Form.of("dense Jacobian, sample by sample", samples, self.dense_bytes(True)),
        ]


def _first(answer: Answer) -> Answer:
    return [one[:_COMPARED] for one in answer]


def _agreement(scope: Scope) -> Iterator[Row]:
    for size in _SMALL:
        problem = _Problem(scope, size)
        closed = Form.of("closed form", problem.closed_form)
        forms = [closed, problem.both(problem.ours), problem.both(problem.plain), problem.dense()[0]]
        yield from scope.compare(problem.labels | {"pass": BOTH}, forms, problem.truth, unit=_UNIT)


def _backward(name: str, scope: Scope) -> Iterator[Row]:
    problem = _Problem(scope, (_QUICK if scope.quick else _SIZES)[name])
    closed = Form.of("closed form", problem.closed_form)
    forms = [closed, problem.backward(problem.ours), problem.backward(problem.plain), *problem.functional(True)]
    labels = problem.labels | {"pass": BACKWARD}
    yield from scope.compare(labels, forms, problem.truth, unit=_UNIT, compared=_first)


def _both(name: str, scope: Scope) -> Iterator[Row]:
    problem = _Problem(scope, (_QUICK if scope.quick else _SIZES)[name])
    forms = [problem.both(problem.ours), problem.both(problem.plain), *problem.functional(False), *problem.dense()]
    yield from scope.compare(problem.labels | {"pass": BOTH}, forms, problem.truth, unit=_UNIT, compared=_first)


def table(rows: Sequence[Row]) -> str:
    """Arrange the measurements: a line a form.

    Args:
        rows: Of any parts.

    Returns:
        Markdown.
    """
    lines, previous = [], ""
    for row in rows:
        head = f"{row['product']}, {_size(row)}, {row['pass']}"
        over = "-" if row["ratio"] is None else f"{1 / row['ratio']:.2f}x"
        first = head if head != previous else ""
        lines.append([first, row["form"], milliseconds(row), over, memory(row), error(row)])
        previous = head
    return markdown(["problem", "form", "ms (quartiles)", "autograd's time over it", "peak memory", "error"], lines)


def _size(row: Row) -> str:
    names = [name for name in "bmnp" if name in row]
    return f"({', '.join(names)}) = ({', '.join(str(row[name]) for name in names)})"


def draw(path: Path, rows: Sequence[Row]) -> None:
    """Draw times and memory: a line of panels a size, bars by form.

    Args:
        path: The PNG.
        rows: Of any parts.
    """
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if row["part"] != "agreement":
            groups.setdefault(f"{row['product']}, {_size(row)}", []).append(row)
    known = [row for row in rows if row["form"] == "hessfree" and row["pass"] == BACKWARD and row["product"] == "AᵀA"]
    best = max((1 / row["ratio"] for row in known if row["part"] != "agreement"), default=None)
    title = "The VJP of AᵀA is one matrix product, B ↦ A(B + Bᵀ); autograd makes two"
    note = "" if best is None else f"Backward alone up to {best:.1f}x as fast. "
    device = f"{rows[0]['device']}, float32; medians, thin lines: quartiles." if rows else ""
    figure = drawing.new_figure(title, f"{note}{device}", (13, 1.2 + 3.2 * max(1, len(groups))))
    grid = figure.subplots(max(1, len(groups)), 2, squeeze=False, width_ratios=[3, 2])
    for axes, (name, group) in zip(grid, groups.items(), strict=False):
        _panels(axes, name, group)
    figure.savefig(path)


def _panels(axes: Any, name: str, rows: Sequence[Row]) -> None:
    dense = [row for row in rows if row["form"].startswith("dense")]
    shown = [row for row in rows if row not in dense]
    names = [row["form"] if row["pass"] == BACKWARD else f"{row['form']}, with forward" for row in shown]
    colours = [_COLOURS[row["form"]] for row in shown]
    least = min((row["needed_bytes"] for row in dense), default=None)
    suffix = "" if least is None else f"\ndense Jacobian: {in_words(least)} at the least"
    drawing.plain(axes[0], f"{name}{suffix}", grid="x")
    times = [row["median_ms"] for row in shown]
    notes = [_short(row) for row in shown]
    drawing.bars(axes[0], names, times, colours, notes, [row["quartiles_ms"] for row in shown])
    axes[0].set_xlabel("ms a call, and its speed over autograd's")
    drawing.plain(axes[1], "peak memory of a call", grid="x")
    peaks = [None if row["peak_bytes"] is None else row["peak_bytes"] / 1e6 for row in shown]
    drawing.bars(axes[1], [""] * len(shown), peaks, colours, [memory(row) for row in shown])
    axes[1].set_xlabel("MB")


def _short(row: Row) -> str:
    """Write the median, and how many times faster than autograd that is, where the form is not autograd."""
    if row["median_ms"] is None:
        return str(row["reason"])
    times = "" if row["ratio"] is None or row["form"] == _UNIT else f"   {1 / row['ratio']:.2f}x"
    return f"{number(row['median_ms'])}{times}"


STUDY = Study(
    name="matmul-vjp",
    question="The derivatives of AᵀA and AB: closed forms, autograd, or the dense Jacobian?",
    parts={
        "agreement": _agreement,
        **{f"{name}-backward": partial(_backward, name) for name in _SIZES},
        **{f"{name}-both": partial(_both, name) for name in _SIZES},
    },
    table=table,
    draw=draw,
)
