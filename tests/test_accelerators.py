"""What differs off the CPU: seen where there is an accelerator, and by its switches where there is none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hessfree import HessianFree
from hessfree.linearization.traced import cache
from hessfree.precision import unit
from hessfree.recording import twice_differentiable
from tests.test_default_device import RECIPES

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


def _absent(name: str) -> bool:
    return not (torch.cuda if name == "cuda" else torch.mps).is_available()


def _steps(recipe: Callable[[Any], HessianFree], device: str) -> list[float]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3)).to(device)
    generator = torch.Generator("cpu").manual_seed(1)
    x, y = (torch.randn(32, width, generator=generator).to(device) for width in (4, 3))
    optimizer = recipe(model.parameters())
    losses = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        return loss

    for _ in range(5):
        losses.append(float(optimizer.step(closure)))
    return losses


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(
    "device",
    [pytest.param(name, marks=pytest.mark.skipif(_absent(name), reason=f"no {name} here")) for name in ("cuda", "mps")],
)
def test_steps_lower_the_loss_as_on_the_cpu(device: str, recipe: str) -> None:
    drawn = recipe in {"Nyström", "stochastic", "defaults", "K-FAC to the power ½"}  # by generators of the device
    found, expected = _steps(RECIPES[recipe], device), _steps(RECIPES[recipe], "cpu")
    assert found == pytest.approx(expected, rel=0.2 if drawn else 1e-2)


@pytest.mark.parametrize(
    ("generation", "switch", "expected"),
    [(8, True, 2.0**-10), (9, True, 2.0**-10), (8, False, 2.0**-23), (7, True, 2.0**-23)],
)
def test_the_rounding_of_products(
    monkeypatch: pytest.MonkeyPatch, generation: int, switch: bool, expected: float
) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (generation, 0))
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", switch)
    assert unit(torch.float32, CUDA) == expected
    assert unit(torch.float32, CPU) == 2.0**-23
    assert unit(torch.float64, CUDA) == 2.0**-52
    assert unit(torch.bfloat16, CUDA) == 2.0**-7


def test_recurrent_layers_run_without_cudnn_and_others_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []

    class Recurrent(nn.LSTM):
        def forward(self, *inputs: Any) -> Any:
            seen.append(torch._C._get_cudnn_enabled())
            if len(seen) == 3:
                raise KeyError("of the user's")
            return super().forward(*inputs)

    class Plain(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(torch._C._get_cudnn_enabled())
            return super().forward(x)

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    recurrent, plain, x = Recurrent(2, 3, batch_first=True), Plain(3, 1), torch.zeros(4, 5, 2)
    assert torch._C._get_cudnn_enabled()
    with twice_differentiable():
        plain(recurrent(x)[0])
        assert seen == [False, True] and torch._C._get_cudnn_enabled()
        with pytest.raises(KeyError):
            recurrent(x)
        assert not seen[2] and torch._C._get_cudnn_enabled()
    recurrent(x)
    assert seen[3]


def test_a_trace_for_which_there_was_no_memory_is_made_at_the_next_step(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    optimizer, x = HessianFree(model.parameters()), torch.ones(8, 3)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        return loss

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    with monkeypatch.context() as patch:
        patch.setattr(cache, "Trace", full)
        optimizer.step(closure)
    assert optimizer.last_step is not None and optimizer.last_step.backend == "graph"
    optimizer.step(closure)
    assert optimizer.last_step.backend == "traced"
