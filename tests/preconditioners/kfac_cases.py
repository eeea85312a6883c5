"""Networks, losses and comparisons that the tests of K-FAC share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hessfree import KFAC
from hessfree.preconditioners import Sample
from tests.preconditioners.oracles import sample_of

DOUBLE = torch.float64
EXACT = KFAC(factors="exact")


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def mlp(*widths: int, bias: bool = True, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for i, o in zip(widths, widths[1:], strict=False):
        layers += [nn.Linear(i, o, bias=bias, dtype=DOUBLE), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def mean_square(z: Tensor) -> Tensor:
    return F.mse_loss(z, torch.ones_like(z))


def cross_entropy(z: Tensor) -> Tensor:
    classes = torch.arange(z[..., 0].numel()) % z.shape[-1]
    return F.cross_entropy(z.reshape(-1, z.shape[-1]), classes)


def by_hand(z: Tensor) -> Tensor:
    """Every sample with a dense block of its own."""
    return ((z.sum(-1) ** 2).exp() + z.sin().square().sum(-1) + 2 * z.square().sum(-1)).mean()


LOSSES = {"mean square": mean_square, "cross-entropy": cross_entropy, "by hand": by_hand}


def learn(sample: Sample, preconditioner: KFAC = EXACT) -> dict[str, Any]:
    state, warning = preconditioner.update({}, sample, 1)
    assert warning is None
    return state


def close(found: Tensor, expected: Tensor, relative: float = 1e-10) -> None:
    assert found.shape == expected.shape
    assert float((found - expected).norm()) <= relative * float(expected.norm())


class Scaled(nn.Module):
    """A parameter of no Linear layer, that every sample shares."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(randn(3, seed=7))
        self.layer = nn.Linear(3, 3, dtype=DOUBLE)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.tanh(self.scale * x))


class Twice(nn.Module):
    """One layer called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.layer = nn.Linear(3, 4, dtype=DOUBLE), nn.Linear(4, 4, dtype=DOUBLE)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.tanh(self.layer(torch.tanh(self.first(x)))))


class Mixing(nn.Module):
    """Positions that look at each other."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 4, dtype=DOUBLE), nn.Linear(4, 3, dtype=DOUBLE)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.last((h @ h.mT).softmax(-1) @ h)


MODELS: dict[str, Any] = {
    "mlp": lambda: (mlp(3, 4, 4, 3), randn(6, 3, seed=3)),
    "no bias": lambda: (mlp(3, 4, 3, bias=False), randn(6, 3, seed=3)),
    "leading dimensions": lambda: (mlp(3, 4, 3), randn(4, 2, 3, seed=3)),
    "called twice": lambda: (Twice(), randn(5, 3, seed=3)),
    "mixing": lambda: (Mixing(), randn(3, 4, 3, seed=3)),
}


def mixed_state() -> tuple[Sample, dict[str, Any], nn.Module, Tensor]:
    torch.manual_seed(1)
    model, x = nn.Sequential(Scaled(), nn.Tanh(), nn.Linear(3, 2, bias=False, dtype=DOUBLE)), randn(8, 3, seed=11)
    sample = sample_of(model, x, by_hand)
    return sample, learn(sample), model, x


def bits(state: Any) -> Any:
    """Turn a state into something that compares bit for bit, with types, dtypes and strides."""
    if isinstance(state, Tensor):
        return (state.dtype, state.shape, state.stride(), state.contiguous().reshape(-1).view(torch.uint8).tolist())
    if isinstance(state, dict):
        return {key: bits(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return [bits(value) for value in state]
    return (type(state), state)
