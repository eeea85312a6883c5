import pytest
import torch

from experiments.models import ToyMLP, time_column


@pytest.fixture
def field() -> ToyMLP:
    torch.manual_seed(0)
    return ToyMLP(2, time_varying=True)


def test_sizes(field: ToyMLP) -> None:
    assert sum(parameter.numel() for parameter in field.parameters()) == 8706
    assert [tuple(layer.weight.shape) for layer in field.net if hasattr(layer, "weight")] == [
        (64, 3),
        (64, 64),
        (64, 64),
        (2, 64),
    ]
    assert ToyMLP(5, out_dim=1, w=7, n_hidden=1)(torch.zeros(4, 5)).shape == (4, 1)


def test_one_time_in_every_form(field: ToyMLP) -> None:
    x = torch.randn(6, 2)
    expected = field(torch.cat([x, torch.full((6, 1), 0.3)], dim=1))
    for t in (0.3, torch.tensor(0.3), torch.tensor([0.3]), torch.full((6,), 0.3), torch.full((6, 1), 0.3)):
        assert torch.equal(field(x, t), expected)
        assert torch.equal(field(x, t=t), expected)
    assert torch.equal(field(x=x, t=torch.tensor(0.3, dtype=torch.float64)), expected)


def test_a_time_for_each_point(field: ToyMLP) -> None:
    x, t = torch.randn(6, 2), torch.rand(6)
    assert torch.equal(field(x, t), field(x, t.unsqueeze(1)))
    assert torch.equal(field(x, t), field(torch.cat([x, t.unsqueeze(1)], dim=1)))
    for row in range(6):
        torch.testing.assert_close(field(x[row], t[row]), field(x, t)[row])


def test_leading_dimensions(field: ToyMLP) -> None:
    x, t = torch.randn(3, 4, 2), torch.rand(3, 4)
    torch.testing.assert_close(field(x, t).flatten(0, 1), field(x.flatten(0, 1), t.flatten()))


def test_time_keeps_the_gradient(field: ToyMLP) -> None:
    t = torch.tensor(0.5, requires_grad=True)
    field(torch.randn(3, 2), t).sum().backward()
    assert t.grad is not None and t.grad != 0


@pytest.mark.parametrize(
    ("shape", "t", "message"),
    [
        ((6, 2), None, r"\[6, 2\].*takes 3 components.*and t"),
        ((6, 3), 0.5, r"\[6, 3\].*takes 2 components"),
        ((6, 2), torch.rand(5), r"t has shape \[5\].*\[6, 2\].*pass a number"),
        ((6, 2), torch.rand(6, 2), r"t has shape \[6, 2\]"),
        ((), 0.5, r"x has shape \[\]"),
    ],
)
def test_wrong_shapes(field: ToyMLP, shape: tuple[int, ...], t: torch.Tensor | float | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        field(torch.zeros(shape), t)


def test_time_for_a_network_without_time() -> None:
    with pytest.raises(ValueError, match="time_varying=True"):
        ToyMLP(2)(torch.zeros(3, 2), 0.5)


@pytest.mark.parametrize("sizes", [{"dim": 0}, {"dim": 2, "w": -1}, {"dim": 2, "n_hidden": 1.5}, {"dim": True}])
def test_impossible_sizes(sizes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="positive integer"):
        ToyMLP(**sizes)


def test_time_column_follows_the_points() -> None:
    column = time_column(torch.zeros(3, 2, dtype=torch.float64), 1)
    assert column.shape == (3, 1) and column.dtype == torch.float64
