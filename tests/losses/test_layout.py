"""Outputs seen as blocks."""

from __future__ import annotations

import pytest
import torch

from hessfree.losses.layout import layouts
from hessfree.vectors import FlatSpace


def space(*shapes: tuple[int, ...]) -> FlatSpace:
    return FlatSpace([torch.Size(s) for s in shapes], [torch.float64] * len(shapes), torch.device("cpu"))


@pytest.mark.parametrize(
    ("shapes", "expected"),
    [
        (((6,),), [(6, 1)]),
        (((6, 4),), [(6, 4)]),
        (((2, 3, 4),), [(6, 4), (8, 3), (2, 12)]),
        (((2, 3, 4, 5),), [(24, 5), (40, 3), (2, 60)]),
        (((5, 2), (5,), (5, 2, 2)), [(5, 7)]),
        (((5, 2), (4, 2)), []),
        (((),), []),
        (((0, 3),), []),
    ],
)
def test_widths_and_round_trips(shapes: tuple[tuple[int, ...], ...], expected: list[tuple[int, int]]) -> None:
    flat_space = space(*shapes)
    found = list(layouts(flat_space))
    assert [(layout.count, layout.width) for layout in found] == expected
    flat = torch.arange(flat_space.size, dtype=torch.float64)
    for layout in found:
        blocks = layout.gather(flat)
        assert blocks.shape == (layout.count, layout.width)
        assert torch.equal(layout.scatter(blocks), flat)


def test_dimension_one_holds_the_channels_of_a_pixel() -> None:
    t = torch.arange(2 * 3 * 4 * 5, dtype=torch.float64).view(2, 3, 4, 5)
    channels = list(layouts(space((2, 3, 4, 5))))[1]
    assert torch.equal(channels.gather(t.flatten())[0], t[0, :, 0, 0])


def test_whole_samples_of_several_outputs() -> None:
    a, b = torch.arange(4.0).view(2, 2), torch.arange(10.0, 12.0)
    (whole,) = layouts(space((2, 2), (2,)))
    assert whole.gather(torch.cat([a.flatten(), b])).tolist() == [[0, 1, 10], [2, 3, 11]]
