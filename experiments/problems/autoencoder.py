"""The deep autoencoder on which Hessian-free optimization made its name, on scikit-learn's digits.

Hinton and Salakhutdinov 2006 (Science 313) could train such a network only after pre-training it layer by layer;
Martens 2010 ("Deep learning via Hessian-free optimization") trained it from random weights. It is a benchmark of
*optimization*: the figure that counts is the loss on the training images.
"""

import functools
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from experiments import data
from experiments.problems.base import Stream, loss_at_start
from experiments.problems.rows import FixedRows
from experiments.problems.seeding import seeded

_INCOMING = 15  # weights a unit that start other than zero


class Autoencoder(nn.Module):
    """Sigmoid layers down to a linear code, and their mirror image up to the logits of grey values.

    Weights start sparse, as in Martens 2010, sec. 5: each unit has 15 incoming weights from N(0, 1), the others are
    zero, and so are the biases. Every unit then sees an input of order-one spread, and units differ as much as can be.
    That serves first and second order alike. Under Glorot's small dense weights a stack of sigmoids forgets the image:
    600 steps of Adam (rate 1e-3, 200 images) end at an excess of 90 nats, hardly better than the mean image with its
    101, where they end at 36 from sparse weights.
    """

    def __init__(self, widths: tuple[int, ...] = (784, 400, 200, 100, 50, 25, 6)) -> None:
        """Build the layers; torch's own stream on the CPU gives the weights.

        Args:
            widths: From the image to the code; the hidden ones are those of the CURVES autoencoder of the two papers.

        Raises:
            ValueError: If there is no layer between image and code.
        """
        super().__init__()
        if len(widths) < 3:
            raise ValueError(f"widths={widths} has no hidden layer; give at least image, hidden and code")
        self.encoder = _stack(widths)
        self.decoder = _stack(widths[::-1])

    def forward(self, images: Tensor) -> Tensor:
        """Reconstruct images.

        Args:
            images: Grey values in [0, 1], `[n, pixels]`.

        Returns:
            Logits of the reconstructed grey values, `[n, pixels]`.
        """
        return self.decoder(self.encoder(images))


def _stack(widths: tuple[int, ...]) -> nn.Sequential:
    """Linear layers with sigmoids between them, the last one linear."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in zip(widths, widths[1:], strict=False):
        layers += [_sparse_linear(fan_in, fan_out), nn.Sigmoid()]
    return nn.Sequential(*layers[:-1])


@torch.no_grad()
def _sparse_linear(fan_in: int, fan_out: int) -> nn.Linear:
    layer = nn.utils.skip_init(nn.Linear, fan_in, fan_out)
    nonzero = min(_INCOMING, fan_in)
    chosen = torch.rand(fan_out, fan_in).argsort(dim=1)[:, :nonzero]
    layer.weight.zero_().scatter_(1, chosen, torch.randn(fan_out, nonzero))
    layer.bias.zero_()
    return layer


def cross_entropy(logits: Tensor, grey: Tensor) -> Tensor:
    """Give the cross-entropy of grey values taken as probabilities, summed over pixels, averaged over images.

    Args:
        logits: `[n, pixels]`.
        grey: In [0, 1], `[n, pixels]`.

    Returns:
        A scalar with its graph, in nats an image.
    """
    return F.binary_cross_entropy_with_logits(logits, grey, reduction="sum") / len(grey)


def entropy(grey: Tensor) -> float:
    """Give what `cross_entropy` cannot go below: the grey values' own entropy.

    Args:
        grey: In [0, 1], `[n, pixels]`.

    Returns:
        Nats an image.
    """
    p = grey.cpu().double()  # not every accelerator has float64
    return -(torch.xlogy(p, p) + torch.xlogy(1 - p, 1 - p)).sum().item() / len(grey)


def _grey(images: Tensor) -> Tensor:
    """From [-1, 1] to [0, 1], where resizing may have overshot by rounding."""
    return ((images + 1) / 2).clamp(0, 1)


@dataclass(frozen=True)
class DigitsAutoencoder:
    """The 1797 digits at 28 x 28 pixels, grey values in [0, 1], through a code of 6 numbers.

    Attributes:
        training: 1500 images, `[1500, 784]`.
        held_out: 297 images, `[297, 784]`.
        device: Where the training runs.
    """

    training: Tensor
    held_out: Tensor
    device: torch.device

    @classmethod
    def of(cls, device: torch.device) -> Self:
        """Load the images.

        Args:
            device: Where the training runs.

        Returns:
            The problem.
        """
        digits = data.digits(784)
        return cls(_grey(digits.training).to(device), _grey(digits.held_out).to(device), device)

    @property
    def name(self) -> str:
        """Autoencoder."""
        return "autoencoder"

    @property
    def score(self) -> str:
        """The training loss above the grey values' entropy."""
        return "train_excess"

    @property
    def rows(self) -> int | None:
        """Number of training images."""
        return len(self.training)

    @property
    def dim(self) -> int:
        """Number of pixels."""
        return self.training.shape[1]

    @functools.cached_property
    def noise_floor(self) -> float:
        """The grey values' entropy, below which no training loss stays."""
        return entropy(self.training)

    @property
    def outputs(self) -> int:
        """One logit a pixel."""
        return self.training.shape[1]

    @functools.cached_property
    def first_loss(self) -> float:
        """The loss at initial weights, on the first rows."""
        return loss_at_start(self)

    def initial_model(self, seed: int) -> nn.Module:
        """Make the network.

        Args:
            seed: Fixes the weights.

        Returns:
            The network, on the device.
        """
        return seeded(Autoencoder, seed, self.device)

    def stream(self, seed: int) -> Stream:
        """Start the first epoch.

        Args:
            seed: Fixes the order of the images.

        Returns:
            The stream, at its beginning.
        """
        return FixedRows(self.training, seed, self.device)

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        """Give the cross-entropy of the reconstructions.

        Args:
            model: The network.
            batch: Images, `[n, 784]`.

        Returns:
            A scalar with its graph: summed over pixels, averaged over images.
        """
        return cross_entropy(model(batch), batch)

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Judge the reconstructions.

        Args:
            model: The network.

        Returns:
            `train_excess`, the training loss less the grey values' entropy, 0 for perfect images; `holdout_loss`;
            `squared_error`, summed over pixels and averaged over the training images, as the papers report.
        """
        logits = model(self.training)
        return {
            "train_excess": cross_entropy(logits, self.training).item() - self.noise_floor,
            "holdout_loss": cross_entropy(model(self.held_out), self.held_out).item(),
            "squared_error": (logits.sigmoid() - self.training).square().sum(1).mean().item(),
        }
