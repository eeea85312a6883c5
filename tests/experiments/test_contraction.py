"""Orders of multiplication, counted: against the numbers of the note, and against trying all of them."""

from __future__ import annotations

import pytest

from experiments.contraction import cheapest_order, count


def test_the_note() -> None:
    shapes = [(100, 100), (100, 10), (10, 1)]
    left, right = count("(AB)C", shapes), count("A(BC)", shapes)
    assert (left.flops, right.flops) == (200_900, 21_800)
    assert (left.multiply_adds, right.multiply_adds) == (101_000, 11_000)
    assert cheapest_order(shapes) == right and right.words == "A(BC)"
    assert cheapest_order([(1, 10), (10, 100), (100, 100)]).words == "(AB)C"
    assert cheapest_order([(3, 4), (4, 5)]).multiply_adds == 60


def test_of_all_orders_of_four_the_least() -> None:
    orders = ["((AB)C)D", "(A(BC))D", "(AB)(CD)", "A((BC)D)", "A(B(CD))"]
    for widths in [(7, 3, 11, 2, 5), (2, 9, 2, 9, 2), (30, 35, 15, 5, 10)]:
        shapes = list(zip(widths, widths[1:], strict=False))
        least = min(count(order, shapes).multiply_adds for order in orders)
        found = cheapest_order(shapes)
        assert found.multiply_adds == least and found.words in orders


def test_errors() -> None:
    with pytest.raises(ValueError, match="A has 3 columns and B has 4 rows: no product AB"):
        cheapest_order([(2, 3), (4, 5)])
    with pytest.raises(ValueError, match="1 matrices are no chain"):
        cheapest_order([(2, 3)])
