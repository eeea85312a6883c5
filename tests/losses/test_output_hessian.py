"""The Hessian of a loss in its outputs: products, the structure that is found, its root and its samples."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hessfree.losses import OutputHessian
from hessfree.recording import Output, Tail
from hessfree.vectors import FlatSpace
from tests.architectures import classes, randn
from tests.oracle import error
from tests.problem import hand_written

Shapes = tuple[tuple[int, ...], ...]
Loss = Callable[[Sequence[Tensor]], Tensor]


@dataclasses.dataclass(frozen=True)
class Case:
    shapes: Shapes
    loss: Loss
    words: str | None  # the form that should be found; None where there is none
    negative: bool = False
    blocks: tuple[int, int] | None = None  # (count, width), to compare columns block by block, if contiguous
    products: int | None = None  # that the closed form costs, if it costs more than a scalar (1) or a diagonal (2)


def one(loss: Callable[[Tensor], Tensor]) -> Loss:
    return lambda z: loss(z[0])


def mixed(z: Sequence[Tensor]) -> Tensor:
    return ((z[0] - z[1]).square() * (0.3 * z[1]).exp()).mean() + z[0].pow(4).mean()


def ce(z: Tensor, seed: int = 2) -> Tensor:
    return F.cross_entropy(z.flatten(0, -2), classes(z[..., 0].numel(), high=z.shape[-1], seed=seed))


def pairs(z: Sequence[Tensor]) -> Tensor:
    """A ranking loss of the differences of two classes: each block of H w is that of a softmax, with some weight."""
    d = torch.cat([t[:, 0] - t[:, 1] for t in z])
    return F.softplus(d[:, None] - d[None] - 1).mean()


TOKENS = classes(2, 4, high=5)
TOKENS[0, 1] = TOKENS[1, 3] = -100
WIDE = classes(6, high=70)
WEIGHTS = torch.linspace(0.1, 3, 70, dtype=torch.float64)

CASES: dict[str, Case] = {
    "mse": Case(((4, 3),), one(lambda z: F.mse_loss(z, randn(4, 3, seed=9))), "scalar"),
    "linear": Case(((4, 3),), one(lambda z: z.mean() + 0 * z.square().sum()), "scalar"),
    "huber": Case(((4, 3),), one(lambda z: F.huber_loss(z, randn(4, 3, seed=9), delta=0.5)), "diagonal"),
    "bce": Case(
        ((4, 3),), one(lambda z: F.binary_cross_entropy_with_logits(z, z.detach().sigmoid().round())), "diagonal"
    ),
    "wide bce": Case(
        ((3, 80),), one(lambda z: F.binary_cross_entropy_with_logits(z, z.detach().sigmoid().round())), "diagonal"
    ),
    "flat": Case(((7,),), one(lambda z: z.exp().mean()), "diagonal"),
    "cross-entropy": Case(
        ((5, 4),), one(lambda z: F.cross_entropy(z, classes(5, high=4))), "softmax over 4", blocks=(5, 4)
    ),
    "two classes, nearly certain": Case(
        ((3, 2),), one(lambda z: F.cross_entropy(z * 8, classes(3, high=2))), "blocks of 2", blocks=(3, 2)
    ),
    "tokens": Case(
        ((2, 4, 5),),
        one(lambda z: F.cross_entropy(z.flatten(0, 1), TOKENS.flatten(), ignore_index=-100)),
        "softmax over 5",
        blocks=(8, 5),
    ),
    "pixels": Case(((2, 3, 2, 4),), one(lambda z: F.cross_entropy(z, classes(2, 2, 4, high=3))), "softmax over 3"),
    "hand-written": Case(
        ((5, 2),), one(lambda z: hand_written(z, randn(5, 2, seed=9))), "blocks of 2", negative=True, blocks=(5, 2)
    ),
    "samples of two dimensions": Case(
        ((4, 2, 3),), one(lambda z: z.flatten(1).square().sum(1).square().mean()), "blocks of 6", blocks=(4, 6)
    ),
    "two outputs": Case(((4, 3), (4, 3)), mixed, "blocks of 6", negative=True),
    "concave": Case(((4, 3),), one(lambda z: -z.square().sum()), "scalar", negative=True),
    "wide cross-entropy": Case(((6, 70),), one(lambda z: F.cross_entropy(z, WIDE)), "softmax over 70", blocks=(6, 70)),
    "wide, weighted, smooth": Case(
        ((6, 70),), one(lambda z: F.cross_entropy(z, WIDE, WEIGHTS, label_smoothing=0.2)), "softmax over 70",
        blocks=(6, 70),
    ),
    "wide, masked": Case(
        ((6, 70),),
        one(lambda z: F.cross_entropy(z, torch.where(torch.arange(6) < 2, -100, WIDE))),
        "softmax over 70",
        blocks=(6, 70),
    ),
    "wide pixels": Case(((2, 65, 3),), one(lambda z: F.cross_entropy(z, classes(2, 3, high=65))), "softmax over 65"),
    "wide and negative": Case(
        ((6, 70),), one(lambda z: -F.cross_entropy(z, WIDE)), "softmax over 70", negative=True, blocks=(6, 70)
    ),
    "coupled samples": Case(((5, 2),), one(lambda z: torch.logsumexp(z.flatten(), 0)), None),
    "wide and not a softmax": Case(((3, 70),), one(lambda z: z.square().sum(1).square().mean()), None),
    "outputs of different lengths": Case(((4, 2), (3, 2)), lambda z: (z[0].sum() * z[1].sum()).square(), None),
    "two classes": Case(((5, 2),), one(ce), "softmax over 2", blocks=(5, 2), products=2),
    "pairs of two classes": Case(((5, 2),), pairs, None, products=3),
    "pairs of two classes in two outputs": Case(((4, 2), (3, 2)), pairs, None, products=3),
    "two heads": Case(((4, 3), (4, 3)), lambda z: ce(z[0]) + 0.5 * ce(z[1], 5), "softmax over 3", products=2),
    "micro-batches": Case(
        ((4, 3), (4, 3), (2, 3)), lambda z: sum(ce(t, i) for i, t in enumerate(z)) / 3, "softmax over 3", products=2
    ),
    "wide micro-batches": Case(
        ((2, 70), (1, 70)), lambda z: sum(ce(t, i) for i, t in enumerate(z)) / 2, "softmax over 70", products=2
    ),
    "micro-batches of tokens": Case(
        ((2, 4, 5), (1, 4, 5)), lambda z: ce(z[0]) + ce(z[1]), "softmax over 5", products=2
    ),
    "classes and numbers": Case(
        ((4, 3), (4, 2)), lambda z: ce(z[0]) + z[1].square().mean(), "softmax over 3 + scalar", products=2
    ),
    "classes and probabilities": Case(
        ((4, 3), (5,)), lambda z: ce(z[0]) + F.softplus(z[1]).sum(), "softmax over 3 + diagonal", products=3
    ),
    "classes and what is linear": Case(
        ((4, 3), (4, 2)), lambda z: ce(z[0]) + z[1].sum(), "softmax over 3 + scalar", products=2
    ),
    "classes, and two numbers compared": Case(
        ((4, 3), (1, 1), (1, 1)), lambda z: ce(z[0]) + (z[1] - z[2]).square().sum(), None, products=3
    ),
    "hand-written micro-batches": Case(
        ((4, 2), (4, 2), (4, 2)), lambda z: sum(hand_written(t, randn(4, 2, seed=i)) for i, t in enumerate(z)),
        "blocks of 6", negative=True,
    ),
    "the last two micro-batches compared": Case(
        ((4, 3), (4, 3), (2, 3)), lambda z: ce(z[0]) + (z[1][:2] - z[2]).square().sum(1).square().mean(), None
    ),
    "classes that share a weight": Case(((4, 3), (4, 3)), lambda z: ce(z[0]) * ce(z[1], 5), None),
    "consistent classes": Case(
        ((4, 3), (4, 3)), lambda z: ce(z[0]) + (z[0].softmax(1) - z[1].softmax(1)).square().mean(), "blocks of 6",
        negative=True,
    ),
}


def case_of(name: str) -> tuple[OutputHessian, Tensor, Case]:
    """Return H as an operator and as a dense matrix."""
    case = CASES[name]
    leaves = [randn(*shape, seed=30 + i).requires_grad_() for i, shape in enumerate(case.shapes)]
    kept = [t * 1 for t in leaves]
    outputs = Output.all_of(kept)
    tail = Tail(case.loss(kept), outputs, leaves)
    space = FlatSpace([t.shape for t in kept], [t.dtype for t in kept], torch.device("cpu"))

    def flat_loss(z: Tensor) -> Tensor:
        return case.loss([p.view(s) for p, s in zip(z.split(space.numels), case.shapes, strict=True)])

    dense = torch.autograd.functional.hessian(flat_loss, space.flatten(leaves))
    return OutputHessian(lambda w: tail.product(w)[0], space, [o.value for o in outputs]), dense, case


def clamped(dense: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(0.5 * (dense + dense.T))
    return vectors * values.clamp_min(0) @ vectors.T


@pytest.mark.parametrize("name", CASES)
def test_products(name: str) -> None:
    hessian, dense, _ = case_of(name)
    w = randn(len(dense), seed=40)
    assert error(hessian.matvec(w), dense @ w) <= 1e-12


@pytest.mark.parametrize("name", CASES)
def test_the_structure_is_found(name: str) -> None:
    hessian, dense, case = case_of(name)
    if case.words is None:
        assert hessian.form is None
        return
    assert hessian.form is not None
    assert hessian.form.words == case.words
    w = randn(len(dense), seed=40)
    assert error(hessian.form.matvec(w), dense @ w) <= 1e-12
    values = torch.linalg.eigvalsh(dense)
    if case.negative:
        share = float(values.clamp_max(0).abs().sum() / values.abs().sum())
        assert abs(hessian.form.negative - share) <= 1e-10
    else:
        assert hessian.form.negative == 0


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.words is not None])
def test_the_root_squares_to_the_clamped_hessian(name: str) -> None:
    hessian, dense, _ = case_of(name)
    assert hessian.form is not None
    root = torch.stack([hessian.form.root(e) for e in torch.eye(len(dense), dtype=torch.float64)], 1)
    # hence E[u uᵀ] = H for u = B times random signs
    assert float((root @ root.T - clamped(dense)).norm()) <= 1e-10 * float(dense.norm())
    transposed = torch.stack([hessian.form.transposed_root(e) for e in torch.eye(len(dense), dtype=torch.float64)], 1)
    assert error(transposed, root.T) <= 1e-14


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.words is not None])
def test_columns_sum_to_the_blocks(name: str) -> None:
    hessian, dense, case = case_of(name)
    assert hessian.form is not None
    columns = torch.stack(list(hessian.form.columns(hessian.space)), 1)
    found, true = columns @ columns.T, clamped(dense)
    inside = dense != 0  # what the sum holds between different blocks means nothing
    assert float(((found - true) * inside).norm()) <= 1e-10 * float(dense.norm())
    if case.blocks is not None:
        # one a position of a sample: a network may mix positions, but not samples
        assert columns.shape[1] == len(columns) // hessian.space.shapes[0][0]


SAMPLED = ["mse", "huber", "cross-entropy", "wide cross-entropy", "pixels", "two outputs", "micro-batches"]


@pytest.mark.parametrize("name", SAMPLED)
def test_samples_have_the_second_moment_of_the_hessian(name: str) -> None:
    hessian, dense, _ = case_of(name)
    assert hessian.form is not None
    generator = torch.Generator().manual_seed(0)
    count = 4000
    draws = torch.stack([hessian.form.sample(generator, hessian.space) for _ in range(count)])
    moment, true = draws.T @ draws / count, clamped(dense)
    # a product of two draws has a standard deviation of at most sqrt(H_ii H_jj) times sqrt(2); 6 of them, by count
    deviation = (true.diagonal()[:, None] * true.diagonal()[None]).sqrt() * (2 / count) ** 0.5
    assert bool(((moment - true).abs() <= 6 * deviation + 1e-15).all())
    again = hessian.form.sample(torch.Generator().manual_seed(0), hessian.space)
    assert torch.equal(again, draws[0])


LEADING = ["mse", "cross-entropy", "wide cross-entropy", "pixels", "two outputs", "tokens", "two heads"]


@pytest.mark.parametrize("name", LEADING)
@pytest.mark.parametrize("rows", [1, 2])
def test_leading_samples(name: str, rows: int) -> None:
    hessian, dense, case = case_of(name)
    samples = case.shapes[0][0]
    keep = torch.cat([torch.arange(n).view(s)[:rows].flatten() + start for n, s, start in zip(
        hessian.space.numels, case.shapes, [0, hessian.space.numels[0]], strict=False)])
    true = dense[keep][:, keep] * samples / rows
    leading = hessian.leading(rows)
    w = randn(len(true), seed=41)
    assert error(leading.matvec(w), true @ w) <= 1e-12
    assert leading.form is not None
    assert error(leading.form.matvec(w), true @ w) <= 1e-12


@pytest.mark.parametrize("name", CASES)
def test_the_closed_form_is_as_exact_as_the_product(name: str) -> None:
    hessian, dense, case = case_of(name)
    calls = counted(hessian)
    words = None if hessian.closed is None else hessian.closed.words
    assert words == (None if case.words is None or "blocks" in case.words else case.words)
    assert calls == [case.products or (1 if words is not None and words != "diagonal" else 2)]
    if hessian.closed is not None:
        w = randn(len(dense), seed=40)
        assert error(hessian.closed.matvec(w), dense @ w) <= 1e-14


@pytest.mark.parametrize("name", ["two heads", "classes and numbers", "cross-entropy", "mse"])
def test_some_of_the_samples(name: str) -> None:
    hessian, dense, case = case_of(name)
    assert hessian.closed is not None
    places = hessian.space.views(torch.arange(len(dense)))
    keep = torch.cat([t[1:3].flatten() for t in places])
    w = randn(len(keep), seed=42)
    assert error(hessian.closed.within(hessian.space, slice(1, 3)).matvec(w), dense[keep][:, keep] @ w) <= 1e-13


@pytest.mark.parametrize(
    ("name", "groups", "coupled"),
    [
        ("micro-batches", (0, 1, 2), False),
        ("classes that share a weight", (0, 1), True),
        ("consistent classes", (0, 1), True),
        ("consistent classes", (0, 0), False),
        ("pairs of two classes in two outputs", (0, 1), True),
        ("hand-written micro-batches", (0, 1, 2), False),
        ("the last two micro-batches compared", (0, 1, 2), True),
        ("the last two micro-batches compared", (0, 1, 1), False),
    ],
)
def test_outputs_that_the_loss_couples(name: str, groups: tuple[int, ...], coupled: bool) -> None:
    hessian, dense, _ = case_of(name)
    group = torch.cat([torch.full((n,), g) for n, g in zip(hessian.space.numels, groups, strict=True)])
    assert bool(dense[group[:, None] != group].any()) == coupled
    assert hessian.couples(groups) == coupled


def test_forms_of_several_outputs_are_as_tolerant_as_one_of_all() -> None:
    """Of a micro-batch that is nearly certain a product is mostly rounding; beside the others it does not count."""
    z = randn(6, 4).float()
    z[:3] = torch.tensor([30.0, 0.0, 1.0, -1.0])
    parts = [t.clone().requires_grad_() * 1 for t in z.split(3)]
    loss = sum(F.cross_entropy(t, torch.tensor([0, 0, 0])) for t in parts)
    outputs = Output.all_of(parts)
    tail = Tail(loss, outputs, [])
    space = FlatSpace([t.shape for t in parts], [t.dtype for t in parts], z.device)
    hessian = OutputHessian(lambda w: tail.product(w)[0], space, [o.value for o in outputs])
    assert hessian.closed is not None and hessian.closed.words == "softmax over 4"


@pytest.mark.parametrize("shapes", [((4, 70),), ((4, 70), (2, 70))], ids=str)
def test_a_form_found_in_half_precision_serves_in_full_precision(shapes: Shapes) -> None:
    z = [randn(*shape, seed=i).bfloat16().requires_grad_() * 1 for i, shape in enumerate(shapes)]
    outputs = Output.all_of(z)
    tail = Tail(sum(ce(t.float()) for t in z), outputs, [])
    space = FlatSpace([t.shape for t in z], [t.dtype for t in z], z[0].device)
    hessian = OutputHessian(lambda w: tail.product(w)[0], space, [o.value for o in outputs])
    single = FlatSpace(space.shapes, [torch.float32] * len(z), space.device)
    found = hessian.in_precision_of(single)
    assert found.closed is not None and found.form is found.closed and found.form.words == "softmax over 70"
    flat = single.flatten([t.double() for t in z]).double()
    dense = torch.autograd.functional.hessian(lambda v: sum(ce(t) for t in single.views(v)), flat)
    w = randn(single.size, seed=40)
    assert error(found.matvec(w.float()).double(), dense @ w) <= 5e-3  # its weights are of rounded products
    u, v = w.float(), w.flip(0).float()
    assert abs(float(u @ found.matvec(v) - v @ found.matvec(u))) <= 1e-6 * float(u.norm() * found.matvec(v).norm())


def counted(hessian: OutputHessian) -> list[int]:
    """Count the products with the recorded loss."""
    calls, product = [0], hessian._product

    def count(w: list[Tensor]) -> Sequence[Tensor | None]:
        calls[0] += 1
        return product(w)

    hessian._product = count
    return calls


def test_what_is_nearly_a_closed_form_is_none() -> None:
    """A coupling of a millionth may be left out of a sample, but not out of a product."""
    z = randn(40).requires_grad_() * 1
    tail = Tail(z.square().sum() + 1e-6 * z[0] * z[1], Output.all_of(z), [])
    space = FlatSpace([z.shape], [z.dtype], z.device)
    hessian = OutputHessian(lambda w: tail.product(w)[0], space, [z.detach()])
    assert hessian.closed is None
    w = torch.eye(40, dtype=torch.float64)[1]
    assert float(hessian.matvec(w)[0]) == 1e-6


def test_outputs_longer_than_the_random_vector(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hessfree.losses.output_hessian.PERIOD", 7)
    drawn = randn(7).float()
    monkeypatch.setattr("hessfree.losses.output_hessian._random_vector", lambda *where: drawn.to(*where))
    for name, words in (("mse", "scalar"), ("huber", "diagonal"), ("tokens", "softmax over 5")):
        hessian, _, _ = case_of(name)
        assert hessian.closed is not None
        assert hessian.closed.words == words
    assert case_of("coupled samples")[0].closed is None


def test_float32_and_half_outputs_are_recognised() -> None:
    for dtype, words in ((torch.float32, "softmax over 5"), (torch.bfloat16, "softmax over 5")):
        z = (randn(6, 5).to(dtype).requires_grad_() * 1)
        outputs = Output.all_of(z)
        tail = Tail(F.cross_entropy(z.float(), classes(6, high=5)), outputs, [])
        hessian = OutputHessian(
            lambda w, tail=tail: tail.product(w)[0], FlatSpace([z.shape], [dtype], z.device), [outputs[0].value]
        )
        assert hessian.form is not None
        assert hessian.form.words == words


def test_a_non_finite_loss_has_no_form() -> None:
    z = torch.tensor([[1.0, float("nan")]], requires_grad=True) * 1
    tail = Tail(F.cross_entropy(z, torch.tensor([0])), Output.all_of(z), [])
    hessian = OutputHessian(lambda w: tail.product(w)[0], FlatSpace([z.shape], [z.dtype], z.device), [z.detach()])
    assert hessian.form is None


def test_values_that_were_overwritten_cost_the_softmax_form_and_nothing_else() -> None:
    z = randn(6, 70).requires_grad_() * 1
    outputs = Output.all_of(z)
    loss = F.cross_entropy(z, WIDE)
    tail = Tail(loss, outputs, [])
    assert outputs[0].value is not None
    overwritten = torch.zeros_like(outputs[0].value)
    hessian = OutputHessian(
        lambda w: tail.product(w)[0], FlatSpace([z.shape], [z.dtype], z.device), [overwritten]
    )
    assert hessian.form is None
