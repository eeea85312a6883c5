"""Networks as people write them, against the autograd graph of the same call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hessfree.linearization.traced import TraceCache, TracedLinearization
from tests.architectures import DOUBLE, classes, mlp, randn
from tests.linearization.traced.recorder import both, both_of, disagreement, parameters_of, record_call

ACTIVATIONS: list[Callable[[], nn.Module]] = [
    nn.ReLU,
    nn.LeakyReLU,
    nn.PReLU,
    nn.ELU,
    nn.SELU,
    nn.CELU,
    nn.GELU,
    lambda: nn.GELU(approximate="tanh"),
    nn.SiLU,
    nn.Mish,
    nn.Softplus,
    nn.Tanh,
    nn.Sigmoid,
    nn.LogSigmoid,
    nn.Hardtanh,
    nn.Hardswish,
    nn.Softsign,
    nn.Tanhshrink,
    nn.Softshrink,
    nn.Hardshrink,
    nn.ReLU6,
    lambda: nn.Softmax(1),
    lambda: nn.LogSoftmax(1),
    nn.GLU,
]


def perceptron(activation: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    narrow = 3 if activation is nn.GLU else 6
    return nn.Sequential(nn.Linear(3, 6), activation(), nn.Linear(narrow, 6), activation(), nn.Linear(narrow, 2))


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: getattr(a, "__name__", "other"))
def test_activation(activation: Callable[[], nn.Module]) -> None:
    traced, graph = both(perceptron(activation).to(DOUBLE), randn(7, 3))
    assert disagreement(traced, graph) <= 1e-14


@pytest.mark.parametrize("activation", [nn.SELU, nn.GELU, nn.ReLU, nn.SiLU], ids=lambda a: a.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_precision(activation: Callable[[], nn.Module], dtype: torch.dtype) -> None:
    traced, graph = both(perceptron(activation).to(dtype), randn(7, 3).to(dtype))
    assert traced.space.dtypes == [dtype]
    assert disagreement(traced, graph) <= 20 * torch.finfo(dtype).eps


class Images(nn.Module):
    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, padding=1, bias=False)
        self.norm, self.again = norm(4), norm(4)
        self.second = nn.Conv2d(4, 4, 3, stride=2, padding=1, groups=2)
        self.up = nn.ConvTranspose2d(4, 4, 2, stride=2)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm(self.first(x)), inplace=True)
        h = h + self.up(F.max_pool2d(F.silu(self.again(self.second(h))), 1))
        return self.head(F.avg_pool2d(h, 2).mean((2, 3)))


@pytest.mark.parametrize(
    "norm", [nn.BatchNorm2d, lambda c: nn.GroupNorm(2, c), nn.InstanceNorm2d, lambda c: nn.LayerNorm([c, 6, 6])]
)
@pytest.mark.parametrize("train", [True, False])
def test_images(norm: Callable[[int], nn.Module], train: bool) -> None:
    torch.manual_seed(0)
    model = Images(norm).to(DOUBLE)
    if isinstance(model.again, nn.LayerNorm):
        model.again = nn.LayerNorm([4, 3, 3]).to(DOUBLE)
    model(randn(5, 2, 6, 6))  # statistics that differ from the initial ones
    model.train(train)
    buffers = [b.clone() for b in model.buffers()]
    call = record_call(model, randn(4, 2, 6, 6))
    after = [b.clone() for b in model.buffers()]
    traced, graph = both_of(call, call.outputs, parameters_of(model))
    assert disagreement(traced, graph) <= 1e-12
    assert all(torch.equal(a, b) for a, b in zip(after, model.buffers(), strict=True))
    if train is False:
        assert all(torch.equal(a, b) for a, b in zip(buffers, after, strict=True))


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
def test_transformer(train: bool, norm_first: bool) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(
        8, 2, 12, dropout=0.2, activation="gelu", batch_first=True, norm_first=norm_first
    )
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).to(DOUBLE).train(train)
    mask = torch.ones(5, 5, dtype=torch.bool).triu(1)
    traced, graph = both(model, randn(3, 5, 8), mask=mask, is_causal=True)
    assert disagreement(traced, graph) <= 1e-12


class Words(nn.Module):
    """An embedding, positions in a buffer, and the embedding again as the last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4, padding_idx=0)
        self.register_buffer("positions", randn(5, 4), persistent=False)
        self.mix = mlp(4, 4, 4)

    def forward(self, tokens: Tensor) -> dict[str, Any]:
        h = self.embed(tokens) + self.positions
        h = h + self.mix(h)
        return {"logits": h @ self.embed.weight.T, "words": "words", "hidden": (h, None), "count": tokens.numel()}


def test_words() -> None:
    torch.manual_seed(0)
    traced, graph = both(Words().to(DOUBLE), classes(3, 5, high=7))
    assert len(traced.space.shapes) == 2
    assert disagreement(traced, graph) <= 1e-12


@pytest.mark.parametrize("depth", [1, 2])
def test_dropout_draws_the_masks_of_the_closure(depth: int) -> None:
    block = [nn.Linear(6, 6), nn.Dropout(0.5), nn.Tanh(), nn.AlphaDropout(0.2)]
    model, cache = nn.Sequential(*block, *block[: 4 * depth - 4]).to(DOUBLE), TraceCache()
    for step in range(3):
        torch.manual_seed(step)
        traced, graph = both(model, randn(8, 6), cache=cache)
        after = torch.rand(3)
        torch.manual_seed(step)
        model(randn(8, 6))
        assert torch.equal(torch.rand(3), after)  # the stream goes on as after one call
        assert disagreement(traced, graph) <= 1e-12
    assert (cache.misses, cache.hits) == (1, 2)


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(3, 5), nn.Linear(5, 5), nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu_(self.first(x)).clone()
        h[:, 0] = 0
        h = self.second(h)
        h[:, 1:3] *= h[:, 3:5].detach().clone()
        h.add_(x.sum(1, keepdim=True))[h > 1] = 0.5
        g = self.third(h)
        g[1].mul_(2).tanh_()
        return g / h.data.norm()


def test_in_place() -> None:
    torch.manual_seed(0)
    model, cache = InPlace().to(DOUBLE), TraceCache()
    for seed in range(3):
        traced, graph = both(model, randn(6, 3, seed=seed), cache=cache)
        assert disagreement(traced, graph) <= 1e-12
    assert cache.misses == 1


class Shared(nn.Module):
    """One layer under two names, called three times."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.same = self.layer
        self.tied = nn.Linear(4, 4)
        self.tied.weight = self.layer.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.tied(torch.tanh(self.same(torch.tanh(self.layer(x)))))


def test_shared_weights() -> None:
    torch.manual_seed(0)
    model = Shared().to(DOUBLE)
    assert parameters_of(model).size == 24
    assert disagreement(*both(model, randn(5, 4))) <= 1e-12


class Velocity(nn.Module):
    """Takes a time as a number, a scalar tensor, or by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(3, 5, 2)

    def forward(self, x: Tensor, t: Tensor | float = 0.0, *, scale: Any = None) -> Tensor:
        column = torch.as_tensor(t, dtype=x.dtype).expand(len(x), 1)
        return self.net(torch.cat([x, column], 1)) * (1 if scale is None else scale["by"])


def test_times_and_keywords() -> None:
    torch.manual_seed(0)
    model, cache = Velocity(), TraceCache()
    for t in (torch.tensor(0.25, dtype=DOUBLE), torch.tensor(0.75, dtype=DOUBLE)):  # a new time is a new input
        assert disagreement(*both(model, randn(4, 2), t, cache=cache)) <= 1e-12
    assert cache.misses == 1
    for t in (0.25, 0.75):  # a new number is a new network
        assert disagreement(*both(model, randn(4, 2), t=t, cache=cache)) <= 1e-12
    assert cache.misses == 3
    for by in (randn(2), randn(2, seed=3)):
        assert disagreement(*both(model, x=randn(4, 2), scale={"by": by}, cache=cache)) <= 1e-12
    assert cache.misses == 4


class WithLoss(nn.Module):
    """Calls one network twice, and goes on to a loss that has no second derivative and writes into z."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(3, 4, 2)
        self.calls = 0

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        first, second = self.net(x), self.net(y)
        self.calls += 1
        return float(first.add_(second).square().sum().detach()) * self.net(x).sum()


@pytest.mark.parametrize("chosen", [(0,), (1,), (1, 0), (0, 1, 2)])
def test_cut_at_inner_calls(chosen: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = WithLoss()
    call = record_call(model, randn(4, 3), randn(4, 3, seed=5))
    outputs = tuple(call.children[i].outputs[0] for i in chosen)
    if 2 in chosen:  # what lies between is evaluated again, and reads a number out of a tensor
        with pytest.raises(RuntimeError, match="trace|item|data"):
            both_of(call, outputs, parameters_of(model))
        return
    traced, graph = both_of(call, outputs, parameters_of(model))
    v = randn(parameters_of(model).size)
    assert torch.allclose(traced.jvp(v), graph.jvp(v), rtol=1e-12)
    assert model.calls == 1


def test_a_part_of_the_batch() -> None:
    torch.manual_seed(0)
    model, x, scale = Velocity(), randn(6, 2), {"by": randn(2)}
    call, parameters = record_call(model, x, scale=scale), parameters_of(model)
    _, part = both(model, x[:4], scale=scale)
    traced = TracedLinearization(
        call, call.outputs, parameters, TraceCache(), arguments=((x[:4],), {"scale": scale})
    )
    assert disagreement(traced, part) <= 1e-12


def test_only_some_parameters() -> None:
    torch.manual_seed(0)
    model = mlp(3, 4, 4, 2)
    model[0].requires_grad_(False)
    model.unused = nn.Parameter(randn(3))
    cache = TraceCache()
    for step in range(2):
        with torch.no_grad():
            model[0].weight.add_(0.1)  # another optimizer trains the first layer
        traced, graph = both(model, randn(5, 3, seed=step), cache=cache)
        assert disagreement(traced, graph) <= 1e-12
    assert cache.misses == 1


def test_several_dtypes() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4).float(), nn.Tanh(), nn.Linear(4, 2).float())
    model[2].to(torch.bfloat16)
    model[1].register_forward_hook(lambda module, args, output: output.bfloat16())
    traced, graph = both(model, torch.randn(5, 3))
    assert traced.space.dtypes == [torch.bfloat16]
    assert disagreement(traced, graph) <= 0.02
