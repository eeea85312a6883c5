"""The measurement of memory, held to functions whose peak can be counted by hand."""

import gc

import pytest
import torch
from torch import nn

from experiments.benchmark.memory import peak_bytes

MEGABYTE = 2**20


def allocate(megabytes: int) -> torch.Tensor:
    return torch.empty(megabytes * MEGABYTE, dtype=torch.uint8)


def test_counts_what_is_held_at_once_and_not_what_follows_one_another() -> None:
    def together() -> None:
        kept = [allocate(3), allocate(5)]
        kept.clear()

    def in_turn() -> None:
        first = allocate(3)
        del first
        second = allocate(5)
        del second

    assert peak_bytes(together) == 8 * MEGABYTE
    assert peak_bytes(in_turn) == 5 * MEGABYTE


def test_counts_what_is_returned_and_not_what_was_there_before() -> None:
    before = [allocate(7)]
    assert peak_bytes(lambda: allocate(2)) == 2 * MEGABYTE
    assert peak_bytes(before.clear) == 0

    def replace() -> torch.Tensor:
        before.clear()
        return allocate(4)

    before.append(allocate(7))
    assert peak_bytes(replace) == 4 * MEGABYTE  # memory from before is not counted, and freeing it gives no credit


def test_counts_temporaries_inside_an_operator() -> None:
    # a convolution in float64 has no fused kernel: it writes all patches of its input into one matrix
    layer = nn.Conv2d(4, 4, 3, padding=1, bias=False, dtype=torch.float64)
    images = torch.randn(1, 4, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        layer(images)
        peak = peak_bytes(lambda: layer(images))
    output, patches = 8 * 4 * 64 * 64, 8 * 4 * 9 * 64 * 64
    assert peak >= output + patches


def test_counts_the_graph_of_a_gradient() -> None:
    x = torch.randn(1 << 18, requires_grad=True)
    size = x.numel() * 4

    def gradient() -> torch.Tensor:
        (found,) = torch.autograd.grad(x.exp().tanh().sum(), x)
        return found

    gradient()
    # exp and tanh keep their results for backward, which begins with one more tensor
    assert 3 * size <= peak_bytes(gradient) <= 4.1 * size


def test_a_cycle_counts_as_held_and_the_collector_is_left_as_it_was() -> None:
    def cycle() -> None:
        kept: list[object] = [allocate(3)]
        kept.append(kept)

    def twice() -> None:
        cycle()
        cycle()

    assert peak_bytes(twice) == 6 * MEGABYTE
    assert gc.isenabled()


def test_an_exception_comes_through() -> None:
    def fail() -> None:
        raise ArithmeticError("no")

    with pytest.raises(ArithmeticError):
        peak_bytes(fail)
    assert gc.isenabled()


def test_a_device_without_a_counter_is_refused() -> None:
    with pytest.raises(ValueError, match="meta"):
        peak_bytes(lambda: None, "meta")
