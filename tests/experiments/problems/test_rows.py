import pytest
import torch

from experiments.flow_matching import Batch
from experiments.problems.rows import FixedRows

ROWS = torch.arange(10.0).unsqueeze(1) * torch.tensor([1.0, -1.0])


@pytest.mark.parametrize("n", [10, 11, 8192])
def test_all_are_the_same_tensor_every_time(n: int) -> None:
    stream = FixedRows(ROWS, seed=0)
    stream.draw(3)
    assert stream.draw(n) is ROWS and stream.draw(n) is ROWS


def test_each_epoch_uses_each_row_once() -> None:
    stream = FixedRows(ROWS, seed=0)
    drawn = torch.cat([stream.draw(n) for n in (3, 3, 3, 3, 9, 9)])  # three epochs
    assert torch.equal(drawn[:, 0], -drawn[:, 1])
    epochs = drawn[:, 0].view(3, 10)
    assert torch.equal(epochs.sort(dim=1).values, ROWS[:, 0].expand(3, 10))
    assert not torch.equal(epochs[0], epochs[1]) and not torch.equal(epochs[1], epochs[2])


def test_order_is_fixed_by_the_seed_however_it_is_cut() -> None:
    def drawn(seed: int, sizes: tuple[int, ...]) -> torch.Tensor:
        stream = FixedRows(ROWS, seed)
        return torch.cat([stream.draw(n) for n in sizes])

    assert torch.equal(drawn(1, (4, 4, 4, 8)), drawn(1, (9, 1, 5, 5)))
    assert not torch.equal(drawn(1, (9, 9)), drawn(2, (9, 9)))


def test_several_tensors_side_by_side() -> None:
    batch = Batch(ROWS, ROWS[:, :1] / 10, 2 * ROWS)
    part = FixedRows(batch, seed=3).draw(4)
    assert len(part) == 4
    assert torch.equal(part.u, 2 * part.x_t) and torch.equal(part.t, part.x_t[:, :1] / 10)
