"""Small modules of many kinds, and seeded inputs for them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

DOUBLE = torch.float64


def randn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def classes(*shape: int, high: int, seed: int = 2) -> Tensor:
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(seed))


def mlp(*widths: int, activation: type[nn.Module] = nn.Tanh) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in zip(widths[:-1], widths[1:], strict=True):
        layers += [nn.Linear(a, b), activation()]
    return nn.Sequential(*layers[:-1]).to(DOUBLE)


class ConvNet(nn.Module):
    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3, padding=1)
        self.norm = nn.BatchNorm2d(2)
        self.head = nn.Linear(2, classes)

    def forward(self, x: Tensor) -> Tensor:
        h = F.selu(self.norm(self.conv(x)))
        return self.head(F.adaptive_avg_pool2d(h, 1).flatten(1))


class Segmenter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.GroupNorm(1, 2), nn.Tanh(), nn.Conv2d(2, 3, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.rnn = kind(2, 3, batch_first=True)
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0])


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x + self.attention(x, x, x, need_weights=False)[0]))


class FusedAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(4, 12)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, 2)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.head(mixed.transpose(1, 2).flatten(2))


class TiedLanguageModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.mix = nn.Linear(3, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        h = torch.tanh(self.mix(self.embed(tokens)))
        return self.head(h + h.cumsum(1))


class Variational(nn.Module):
    """Returns nested outputs that depend on each other, one entry that the loss leaves out, and words."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(3, 4)
        self.decoder = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 3))

    def forward(self, x: Tensor) -> dict[str, Any]:
        mu, logvar = self.encoder(x).chunk(2, 1)
        z = mu + (0.5 * logvar).exp() * torch.randn_like(mu)
        return {"recon": self.decoder(z), "latent": (mu, [logvar]), "unused": z.square(), "name": "vae", "none": None}


class Heads(NamedTuple):
    mean: Tensor
    scale: Tensor


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(3, 4)
        self.mean = nn.Linear(4, 2)
        self.scale = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Heads:
        h = torch.tanh(self.body(x))
        return Heads(self.mean(h), self.scale(h))


class WithLoss(nn.Module):
    """Returns (logits, loss), as many language models do."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(3, 4, 3)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.net(x)
        return logits, F.cross_entropy(logits, y)


class Wrapper(nn.Module):
    """Hands everything on, as DistributedDataParallel and OptimizedModule do."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


class Cube(torch.autograd.Function):
    """x³ / 3 with a backward that autograd can differentiate again, and no jvp."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3 / 3

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return g * x**2


class Custom(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(Cube.apply(self.first(x)))


class Checkpointed(nn.Module):
    def __init__(self, use_reentrant: bool = False) -> None:
        super().__init__()
        self.first, self.body, self.head = nn.Linear(3, 4), mlp(4, 4, 4), nn.Linear(4, 2)
        self.dropout = nn.Dropout(0.3)
        self.use_reentrant = use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        h = checkpoint(lambda t: self.dropout(self.body(t)), self.first(x), use_reentrant=self.use_reentrant)
        return self.head(h)


class InPlace(nn.Module):
    """Writes into its activations."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = F.celu_(self.first(x))
        h = self.second(h)
        h[:, 0] = 0
        return self.head(torch.tanh(h))


class Partial(nn.Module):
    """A frozen layer, a layer that nothing calls, and a parameter that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen, self.used, self.unused = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(2, 2)
        self.bare = nn.Parameter(torch.ones(2))
        self.frozen.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(torch.tanh(self.frozen(x)))


class Scaled(nn.Module):
    """Holds a network and a bare parameter that the closure uses itself."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(3, 3, 2)
        self.log_scale = nn.Parameter(torch.tensor([0.3, -0.2]))


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = mlp(3, 4, 2), mlp(2, 4, 3)


class CheckpointedAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.norm, self.head = FusedAttention(), nn.BatchNorm1d(3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = checkpoint(lambda t: self.norm(self.attention(t).flatten(0, 1)), x, use_reentrant=False)
        return self.head(h)
