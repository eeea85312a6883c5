"""The networks of the coverage table: how each is built, fed and scored, and which back end should serve it."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from tests import architectures as known
from tests.architectures import DOUBLE, classes, mlp, randn
from tests.coverage import modules

Loss = Callable[[Any, Any], Tensor]


@dataclasses.dataclass(frozen=True)
class Case:
    """One network.

    Attributes:
        build: Makes it.
        inputs: The arguments of its call at a step, from a seed.
        targets: What the loss compares with, from a seed.
        loss: (what the network returned, targets) -> scalar.
        backend: The back end that "auto" should choose in a step; None where there is none.
        error: What the error of a network without back end should say.
        difference: Bound on the relative error of central differences; None where autograd's Jacobian is not the
            derivative of what is computed (a detached estimate depends on the parameters).
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[int], tuple[Any, ...]]
    targets: Callable[[int], Any]
    loss: Loss = F.mse_loss
    backend: str | None = "traced"
    error: str = ""
    difference: float | None = 1e-6


def rows(*shape: int) -> Callable[[int], tuple[Any, ...]]:
    return lambda seed: (randn(*shape, seed=seed),)


def values(*shape: int) -> Callable[[int], Tensor]:
    return lambda seed: randn(*shape, seed=100 + seed)


def labels(*shape: int, high: int) -> Callable[[int], Tensor]:
    return lambda seed: classes(*shape, high=high, seed=100 + seed)


def tokens(*shape: int, high: int) -> Callable[[int], tuple[Any, ...]]:
    return lambda seed: (classes(*shape, high=high, seed=seed),)


def vector_case(build: Callable[[], nn.Module], backend: str | None = "traced", **more: Any) -> Case:
    """A network from 3 to 2 numbers under the mean squared error."""
    return Case(build, rows(6, 3), values(6, 2), backend=backend, **more)


def between(function: Any, backend: str = "traced", **more: Any) -> Case:
    return vector_case(lambda: modules.Between(function), backend, **more)


def sequence_case(kind: type[nn.RNNBase], backend: str) -> Case:
    return Case(lambda: known.Recurrent(kind), rows(2, 4, 2), values(2, 4, 2), backend=backend)


def transformer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.2, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def vision_transformer() -> nn.Module:
    return torchvision.models.VisionTransformer(
        image_size=16, patch_size=8, num_layers=2, num_heads=2, hidden_dim=8, mlp_dim=16, dropout=0.1, num_classes=5
    )


def frozen_resnet() -> nn.Module:
    """As in fine-tuning: the trunk is frozen and in eval mode, the last layer trains."""
    model = torchvision.models.resnet18(num_classes=5).eval()
    model.requires_grad_(False)
    model.fc.requires_grad_(True)
    return model


def old_style(normalise: Callable[[nn.Module], nn.Module]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # deprecated, and all over the code that people run
            return nn.Sequential(normalise(nn.Linear(3, 4)), nn.Tanh(), normalise(nn.Linear(4, 2)))

    return build


def normalised(normalise: Callable[[nn.Module], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(normalise(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 2))


def variational_loss(out: dict[str, Any], x: Tensor) -> Tensor:
    mu, (logvar,) = out["latent"]
    kl = 0.5 * (mu.square() + logvar.exp() - logvar - 1).sum(1).mean()
    return (out["recon"] - x).square().sum(1).mean() + 0.7 * kl


def heads_loss(out: known.Heads, y: Tensor) -> Tensor:
    return (out.scale + (y - out.mean).square() * (-2 * out.scale).exp()).mean()


class Composed(nn.Module):
    """An encoder and a decoder, which the loss calls one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = mlp(3, 4, 2), mlp(2, 4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x))


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(3, 4, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.net(x), self.net(x.flip(0) * 2)


def pair_loss(out: tuple[Tensor, Tensor], y: Tensor) -> Tensor:
    return F.mse_loss(out[0], y) + F.smooth_l1_loss(out[1], out[0] + y)


def language_loss(out: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(out.flatten(0, 1), y.flatten())


IMAGES = rows(4, 3, 32, 32)

CASES: dict[str, Case] = {
    "ResNet-18": Case(
        lambda: torchvision.models.resnet18(num_classes=5),
        IMAGES,
        labels(4, high=5),
        F.cross_entropy,
        difference=0.05,  # thousands of rectifiers, some of which switch in between
    ),
    "ResNet-18, frozen trunk": Case(frozen_resnet, IMAGES, labels(4, high=5), F.cross_entropy),
    "ViT": Case(vision_transformer, rows(3, 3, 16, 16), labels(3, high=5), F.cross_entropy),
    "U-Net with GroupNorm": Case(modules.UNet, rows(2, 1, 8, 8), values(2, 1, 8, 8)),
    "BatchNorm in train mode": Case(known.ConvNet, rows(4, 1, 4, 4), labels(4, high=3), F.cross_entropy),
    "BatchNorm in eval mode": Case(
        lambda: known.ConvNet().eval(), rows(4, 1, 4, 4), labels(4, high=3), F.cross_entropy
    ),
    "LSTM": sequence_case(nn.LSTM, "traced"),
    "GRU": sequence_case(nn.GRU, "traced"),
    "TransformerEncoder": Case(transformer, rows(2, 5, 8), values(2, 5, 8)),
    "MultiheadAttention": Case(known.Attention, rows(2, 3, 4), values(2, 3, 2), F.smooth_l1_loss),
    "scaled_dot_product_attention": Case(
        known.FusedAttention, rows(2, 3, 4), labels(2, 3, high=3), language_loss
    ),
    "tied weights": Case(known.TiedLanguageModel, tokens(2, 4, high=5), labels(2, 4, high=5), language_loss),
    "frozen and unused weights": vector_case(known.Partial),
    "ParameterList": vector_case(modules.Listed),
    "dropout": vector_case(
        lambda: nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.4), nn.Tanh(), nn.Linear(8, 2), nn.AlphaDropout(0.2))
    ),
    "weight_norm": vector_case(normalised(parametrizations.weight_norm)),
    "spectral_norm": vector_case(normalised(parametrizations.spectral_norm), difference=None),
    "orthogonal": vector_case(
        lambda: nn.Sequential(parametrizations.orthogonal(nn.Linear(3, 3)), nn.Tanh(), nn.Linear(3, 2))
    ),
    "old weight_norm": vector_case(old_style(nn.utils.weight_norm)),
    "old spectral_norm": vector_case(old_style(nn.utils.spectral_norm), difference=None),
    "checkpoint": vector_case(known.Checkpointed, "graph"),
    "reentrant checkpoint": vector_case(
        lambda: known.Checkpointed(use_reentrant=True), None, error="checkpoint with use_reentrant=True"
    ),
    "custom Function": vector_case(known.Custom),
    "custom Function with jvp": between(lambda _, h: modules.CubeWithJvp.apply(h)),
    "in-place operations": vector_case(known.InPlace),
    "h[:, 0] = 0": between(modules.zeroed_column),
    "index masks": between(modules.masked),
    "rows chosen by a mask": Case(
        lambda: modules.Between(modules.selected),
        rows(6, 3),
        lambda _: torch.zeros((), dtype=DOUBLE),
        lambda z, _: z.square().mean(),
        "graph",
    ),
    "complex intermediates": between(modules.spectrum),
    "straight-through estimator": between(modules.straight_through, difference=None),
    "loop until small": between(modules.until_small, "graph"),
    "fixed loop": between(modules.implicit_steps),
    "pairwise distances": between(modules.distances),
    "torch.compile": vector_case(lambda: torch.compile(mlp(3, 4, 2), backend="eager")),
    "buffers updated in forward": vector_case(modules.RunningScale),
    "mixture of experts": vector_case(modules.Experts),
    "hypernetwork": vector_case(modules.Hypernetwork),
    "forces of an energy": Case(modules.Energy, rows(5, 3), values(5, 3)),
    "grid_sample": Case(modules.Sampled, rows(2, 1, 5, 5), values(2, 2, 2, 3)),
    "named outputs": Case(known.TwoHeads, rows(5, 3), values(5, 2), heads_loss),
    "VAE, dict outputs": Case(known.Variational, rows(5, 3), lambda seed: randn(5, 3, seed=seed), variational_loss),
    "logits and loss": Case(
        known.WithLoss,
        lambda seed: (randn(5, 3, seed=seed), classes(5, high=3, seed=seed)),
        lambda _: None,
        lambda out, _: out[1],
    ),
    "net of net": vector_case(Composed),
    "two calls of one net": Case(Twice, rows(5, 3), values(5, 2), pair_loss),
    "EmbeddingBag": Case(modules.Bag, tokens(4, 3, high=7), values(4, 2), backend=None, error="embedding_bag"),
    "hardsigmoid": vector_case(modules.Hidden, None, error="hardsigmoid_backward"),
}
