"""Which back end serves which network, and that none is wrong."""

from __future__ import annotations

import pytest

from tests.coverage.cases import CASES
from tests.coverage.study import HEADER, examine, table


@pytest.mark.parametrize("name", CASES)
def test_products_over_three_steps(name: str) -> None:
    case, row = CASES[name], examine(name)
    if case.backend is None:
        assert row.backend == "none"
        assert case.error in row.message
        return
    assert not row.message
    assert row.backend == row.in_operator == case.backend
    assert all(found <= 1e-9 for found in (row.jvp, row.vjp, row.product, row.operator))
    assert case.difference is None or row.difference <= case.difference


def test_the_table() -> None:
    rows = table()
    assert len({row.name for row in rows}) >= 25
    print()  # seen with pytest -s
    print(HEADER)
    for row in rows:
        print(row)
