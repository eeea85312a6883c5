import sys

import pytest
import torch
from scipy.optimize import linear_sum_assignment

from experiments.environment import UsageError
from experiments.optimal_transport import pair


@pytest.mark.parametrize(("n", "dim"), [(1, 2), (40, 2), (64, 5)])
def test_the_cheapest_permutation(n: int, dim: int) -> None:
    generator = torch.Generator().manual_seed(n)
    x0, x1 = torch.randn(n, dim, generator=generator), 3 * torch.randn(n, dim, generator=generator)
    indices = pair(x0, x1)
    assert sorted(indices.tolist()) == list(range(n))
    cost = torch.cdist(x0.double(), x1.double()).square()
    rows, columns = linear_sum_assignment(cost.numpy())
    assert cost[torch.arange(n), indices].sum().item() == pytest.approx(cost.numpy()[rows, columns].sum(), rel=1e-12)


def test_shapes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"x0 has shape \[3, 2\] and x1 \[4, 2\]"):
        pair(torch.zeros(3, 2), torch.zeros(4, 2))


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ot", None)
    with pytest.raises(UsageError, match=r"needs POT; run: pip install"):
        pair(torch.zeros(3, 2), torch.zeros(3, 2))
