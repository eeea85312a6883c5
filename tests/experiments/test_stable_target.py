import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from experiments import data
from experiments.flow_matching import Batch, BatchStream, sample_batch
from experiments.stable_target import BLOCK, stable_target


def rows(name: str, n: int) -> Batch:
    return sample_batch(data.load(name), n, torch.Generator().manual_seed(1))


def test_each_row_by_hand() -> None:
    raw = rows("digits", 12)
    raw = Batch(raw.x_t.double(), raw.t.double(), raw.u.double())
    raw.t[5] = 0.99
    found = stable_target(raw, block=4)
    x1 = raw.x_t + (1 - raw.t) * raw.u
    for i in range(12):
        t, members = raw.t[i].item(), range(i // 4 * 4, i // 4 * 4 + 4)
        weights = [
            math.exp(-((raw.x_t[i] - t * x1[j]).square().sum().item()) / (2 * (1 - t) ** 2) + 32) for j in members
        ]
        mean = sum(w * x1[j] for w, j in zip(weights, members, strict=True)) / sum(weights)
        expected = raw.u[i] if t > 0.98 else (mean - raw.x_t[i]) / (1 - t)
        torch.testing.assert_close(found.u[i], expected)
    assert torch.equal(found.x_t, raw.x_t) and torch.equal(found.t, raw.t)
    assert not torch.equal(found.u, raw.u)


MOMENTS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "1": lambda x, t, v: torch.ones_like(t),
    "t": lambda x, t, v: t,
    "x": lambda x, t, v: x,
    "x t": lambda x, t, v: x * t,
    "|x|² x": lambda x, t, v: x.square().sum(1, keepdim=True) * x,
    "cos x": lambda x, t, v: torch.cos(x),
    "sin 3x": lambda x, t, v: torch.sin(3 * x),
    "late x": lambda x, t, v: x * (t > 0.8),
    "E[u | x, t]": lambda x, t, v: v,
}


@pytest.fixture(scope="module", params=["8gaussians", "checkerboard"])
def errors(request: pytest.FixtureRequest) -> tuple[Batch, Tensor, Tensor]:
    """Rows in blocks of 64, their exact velocity, and how far their target is from it."""
    raw = rows(request.param, 128 * 1024)
    exact = data.load(request.param).conditional_expectation(raw.x_t, raw.t)
    return raw, exact, (stable_target(raw, block=64).u - exact).double()


@pytest.mark.parametrize("moment", MOMENTS)
def test_unbiased(errors: tuple[Batch, Tensor, Tensor], moment: str) -> None:
    raw, exact, noise = errors
    products = noise * MOMENTS[moment](raw.x_t, raw.t, exact)
    # Rows of one block share their data points; blocks are independent.
    blocks = products.sum(1).view(-1, 64).mean(1)
    standard_error = blocks.std() / len(blocks) ** 0.5
    assert blocks.mean().abs() < 4 * standard_error
    # The moments are sharp: a target off by 2 % of its size would be seen in the last one.
    if moment == "E[u | x, t]":
        assert 0.02 * exact.square().sum(1).mean() > 5 * standard_error


def test_less_noise_the_larger_the_block() -> None:
    raw = rows("8gaussians", 64 * BLOCK)
    exact = data.load("8gaussians").conditional_expectation(raw.x_t, raw.t)
    of_raw, of_64, of_256 = (
        (u - exact).square().mean().item() for u in (raw.u, stable_target(raw, 64).u, stable_target(raw).u)
    )
    assert of_raw == pytest.approx(4.93, rel=0.05)
    assert of_64 == pytest.approx(0.38, rel=0.15)
    assert of_256 == pytest.approx(0.18, rel=0.15)


def test_float32_suffices() -> None:
    raw = rows("8gaussians", 8192)
    exact = stable_target(Batch(raw.x_t.double(), raw.t.double(), raw.u.double()))
    error = stable_target(raw).u - exact.u
    assert error.square().mean() ** 0.5 < 1e-4 and error.mean().abs() < 1e-6


def test_stream_does_not_depend_on_how_it_is_cut() -> None:
    dataset = data.load("8gaussians")
    whole = BatchStream(dataset, 5, target=stable_target).draw(9000)
    stream = BatchStream(dataset, 5, target=stable_target)
    parts = [stream.draw(n) for n in (100, 8192, 708)]
    assert torch.equal(torch.cat([part.u for part in parts]), whole.u)
    raw = BatchStream(dataset, 5).draw(9000)
    assert torch.equal(whole.x_t, raw.x_t) and torch.equal(whole.t, raw.t)
    assert torch.equal(whole.u[:8192], stable_target(raw[:8192]).u)


@pytest.mark.parametrize("block", [0, 100, -4])
def test_blocks_that_do_not_fit(block: int) -> None:
    with pytest.raises(ValueError, match=f"block={block} does not divide a batch of 256 rows"):
        stable_target(rows("moons", 256), block)
