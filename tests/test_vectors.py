from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from hessfree.vectors import FlatSpace, ParameterVector

DTYPES = [
    ((torch.float32, torch.float32), torch.float32),
    ((torch.float64, torch.float32), torch.float64),
    ((torch.bfloat16, torch.float32), torch.float32),
    ((torch.bfloat16, torch.bfloat16), torch.float32),
    ((torch.float16, torch.bfloat16), torch.float32),
    ((torch.bfloat16, torch.float64), torch.float64),
]


def parameters(*dtypes: torch.dtype) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 3), (), (4,), (0, 5), (1, 2, 2)]
    return [
        nn.Parameter(torch.randn(shape, generator=generator).to(dtypes[i % len(dtypes)]))
        for i, shape in enumerate(shapes)
    ]


@pytest.mark.parametrize(("dtypes", "expected"), DTYPES)
def test_round_trip(dtypes: tuple[torch.dtype, ...], expected: torch.dtype) -> None:
    vector = ParameterVector(parameters(*dtypes))
    flat = vector.values()
    assert flat.shape == (vector.size,) == (15,) and flat.dtype == vector.dtype == expected
    assert not flat.requires_grad
    for p, piece, view in zip(vector.params, vector.split(flat), vector.views(flat), strict=True):
        assert piece.dtype == p.dtype and torch.equal(piece, p)
        assert view.dtype == expected and view.shape == p.shape
    assert torch.equal(vector.flatten(vector.split(flat)), flat)


def test_a_flat_vector_shares_no_memory() -> None:
    single = nn.Parameter(torch.ones(3))
    for params in ([single], [single, nn.Parameter(torch.ones(2))]):
        vector = ParameterVector(params)
        vector.values().zero_()
        assert torch.equal(single.detach(), torch.ones(3))


def test_rows_first_whatever_the_memory_says() -> None:
    p = nn.Parameter(torch.arange(6.0).view(2, 3).T)
    assert not p.is_contiguous()
    vector = ParameterVector([p])
    assert vector.values().tolist() == [0, 3, 1, 4, 2, 5]
    backup = vector.backup()
    vector.take_step(backup, torch.arange(6.0))
    assert p.detach().reshape(-1).tolist() == [0, 4, 3, 7, 6, 10]


def test_missing_tensors_are_zeros() -> None:
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
    a.grad = torch.tensor([1.0, 2.0])
    vector = ParameterVector([a, b])
    assert vector.gradients().tolist() == [1, 2, 0, 0, 0]
    assert vector.zeros().tolist() == [0] * 5
    with pytest.raises(ValueError, match="argument"):
        vector.flatten([a])


def test_tied_tensors_count_once() -> None:
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    second.weight = first.weight
    tied = [first.weight, first.bias, second.weight, second.bias]
    vector = ParameterVector(tied)
    assert vector.size == 15 and [id(p) for p in vector.params] == [id(tied[i]) for i in (0, 1, 3)]
    assert vector.index_of(second.weight) == 0 and vector.slice_of(second.bias) == slice(12, 15)
    assert first.weight in vector and first.weight.detach() not in vector and 3 not in vector


def test_slices_fit_the_vector() -> None:
    vector = ParameterVector(parameters(torch.float32))
    flat = vector.values()
    for p in vector.params:
        assert torch.equal(flat[vector.slice_of(p)], p.detach().reshape(-1))


def bits(t: Tensor) -> list[int]:
    return t.detach().reshape(-1).view(torch.uint8).tolist()  # NaN equals itself, and -0 is not 0


@pytest.mark.parametrize("dtypes", [dtypes for dtypes, _ in DTYPES])
def test_restore_is_bitwise(dtypes: tuple[torch.dtype, ...]) -> None:
    params = parameters(*dtypes)
    with torch.no_grad():
        params[0][0, 0] = torch.nan
        params[0][0, 1] = -0.0
        params[2][0] = torch.inf
    vector, before = ParameterVector(params), [p.detach().clone() for p in params]
    backup = vector.backup()
    vector.try_step(backup, torch.full((vector.size,), 0.37, dtype=vector.dtype))
    assert not torch.equal(params[4], before[4])
    vector.restore(backup)
    for p, b in zip(params, before, strict=True):
        assert bits(p) == bits(b)


def product_graph(p: Tensor) -> Tensor:
    return (p * p).sum()  # saves p for its backward pass


def test_a_trial_step_is_unseen_by_version_counters_and_a_step_is_seen() -> None:
    p = nn.Parameter(torch.tensor([1.0, 2.0]))
    vector = ParameterVector([p])
    loss, backup, version = product_graph(p), vector.backup(), p._version
    vector.try_step(backup, torch.tensor([10.0, 10.0]))
    assert p.tolist() == [11, 12] and p._version == version
    vector.restore(backup)
    assert p._version == version
    assert torch.autograd.grad(loss, p, retain_graph=True)[0].tolist() == [2, 4]
    vector.take_step(backup, torch.tensor([10.0, 10.0]))
    assert p.tolist() == [11, 12] and p._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, p)


@pytest.mark.parametrize("write", ["try_step", "take_step"])
def test_a_step_is_rounded_once(write: str) -> None:
    p = nn.Parameter(torch.tensor([1.0], dtype=torch.bfloat16))
    vector = ParameterVector([p])
    # 0.00391 is a little more than half the distance (2^-7) between 1 and the next bfloat16; rounded first, half
    step = torch.tensor([2**-8 * (1 + 2**-10)])
    getattr(vector, write)(vector.backup(), step)
    assert float(p.detach()) == 1 + 2**-7


def test_a_number_for_each_parameter() -> None:
    vector = ParameterVector([nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3, dtype=torch.float64))])
    assert vector.uniform_or_vector([0.5, 0.5]) == 0.5
    mixed = vector.uniform_or_vector([0.5, 0.1])
    assert isinstance(mixed, Tensor) and mixed.dtype == torch.float64
    assert mixed.tolist() == [0.5, 0.5, 0.1, 0.1, 0.1]


def test_a_space_of_outputs() -> None:
    space = FlatSpace([torch.Size((2, 2)), torch.Size(())], [torch.float16, torch.float16], torch.device("cpu"))
    assert (space.size, space.dtype, space.numels) == (5, torch.float32, [4, 1])
    pieces = space.split(torch.arange(5.0))
    assert [t.dtype for t in pieces] == [torch.float16] * 2 and pieces[1].ndim == 0


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ([], "no parameter that requires grad was given"),
        ([torch.zeros(2, 3, dtype=torch.complex64)], r"shape \(2, 3\) has dtype torch.complex64.*view_as_real"),
        ([torch.zeros(2, dtype=torch.int64)], r"shape \(2,\) has dtype torch.int64, and integer"),
        ([nn.LazyLinear(3).weight], "uninitialised.*one forward pass"),
        ([torch.zeros(2), torch.zeros(2, device="meta")], r"several devices \(cpu, meta\).*single device"),
    ],
    ids=["none", "complex", "integer", "lazy", "devices"],
)
def test_what_cannot_be_a_vector(params: list[Tensor], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ParameterVector(params)
