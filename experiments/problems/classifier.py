"""A small convolutional network that tells scikit-learn's digits apart, on images that are distorted anew for ever.

1500 images of 8 x 8 pixels are too few to compare optimizers by a held-out loss: within seconds each of them knows the
images by heart, and who is judged best is who was slowest. Every row is therefore an image turned, scaled and shifted
at random, which never comes twice; the rows of judgement are held-out images distorted in the same way.
"""

import functools
import math
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from experiments.problems.base import Stream, loss_at_start
from experiments.problems.seeding import seeded

_SIDE, _CLASSES = 8, 10
_TRAINING = 1500  # of 1797
_SPLIT_SEED = 7
_BLOCK = 8192
_HELD_OUT_ROWS = 4096
_HELD_OUT_SEED = 12345
_TURN = math.radians(15)
_SCALE = 0.15
_SHIFT = 1.0  # pixels


@dataclass(frozen=True)
class Labelled:
    """Images with their digits.

    Attributes:
        images: `[n, 1, 8, 8]`, grey values in [-1, 1].
        labels: `[n]`, int64.
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        """Give the number of images."""
        return len(self.images)

    def __getitem__(self, rows: slice | Tensor) -> "Labelled":
        """Give some of the rows, for a slice as views."""
        return Labelled(self.images[rows], self.labels[rows])

    def to(self, device: torch.device | str) -> "Labelled":
        """Copy the rows, where they live elsewhere.

        Args:
            device: Where they shall live.

        Returns:
            The rows there.
        """
        return Labelled(self.images.to(device), self.labels.to(device))


def distorted(source: Labelled, n: int, generator: torch.Generator) -> Labelled:
    """Draw images with replacement, and turn, scale and shift each.

    Args:
        source: The images, on the CPU.
        n: How many.
        generator: The source of randomness, on the CPU.

    Returns:
        n rows: turned by up to 15 degrees, scaled by up to 15 % and shifted by up to a pixel along each axis, all
        uniformly and independently; what comes from outside has the grey of the background.
    """
    rows = source[torch.randint(len(source), (n,), generator=generator)]
    turn, scale, right, down = (2 * torch.rand(n, 4, generator=generator) - 1).unbind(1)
    turn, scale, step = _TURN * turn, 1 + _SCALE * scale, 2 * _SHIFT / _SIDE
    cosine, sine = scale * turn.cos(), scale * turn.sin()
    first = torch.stack([cosine, -sine, step * right], dim=1)
    second = torch.stack([sine, cosine, step * down], dim=1)
    grid = F.affine_grid(torch.stack([first, second], dim=1), [n, 1, _SIDE, _SIDE], align_corners=False)
    # the background is -1 and grid_sample fills up with 0
    moved = F.grid_sample(rows.images + 1, grid, mode="bilinear", align_corners=False) - 1
    return Labelled(moved, rows.labels)


class Distortions:
    """An endless sequence of distorted images, the same for a seed however it is cut into batches."""

    def __init__(self, source: Labelled, seed: int, device: torch.device) -> None:
        """Start the sequence.

        Args:
            source: The images, on the CPU.
            seed: Fixes the sequence.
            device: Where the batches shall live.
        """
        self._source = source
        self._generator = torch.Generator().manual_seed(seed)
        self._device = device
        self._left = source[:0].to(device)

    def draw(self, n: int) -> Labelled:
        """Take the next rows.

        Args:
            n: How many.

        Returns:
            The batch of n rows.
        """
        while len(self._left) < n:
            block = distorted(self._source, _BLOCK, self._generator).to(self._device)
            self._left = Labelled(
                torch.cat([self._left.images, block.images]), torch.cat([self._left.labels, block.labels])
            )
        rows, self._left = self._left[:n], self._left[n:]
        return rows


class SmallConvNet(nn.Module):
    """Two convolutions, the second one with stride 2, a mean over quarters of the image, and a linear layer."""

    def __init__(self) -> None:
        """Build the layers with torch's default initial weights: 6090 parameters."""
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.GELU(),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Linear(32 * 4, _CLASSES),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Classify images.

        Args:
            images: `[n, 1, 8, 8]`.

        Returns:
            Logits, `[n, 10]`.
        """
        return self.net(images)


@dataclass(frozen=True)
class DigitsClassifier:
    """The digit of a distorted image.

    Attributes:
        training: 1500 images as they are, on the CPU.
        held_out: 4096 distorted ones, made of the other 297, on the device.
        device: Where the training runs.
    """

    training: Labelled
    held_out: Labelled
    device: torch.device

    @classmethod
    def of(cls, device: torch.device) -> Self:
        """Load the images.

        Args:
            device: Where the training runs.

        Returns:
            The problem.
        """
        from sklearn.datasets import load_digits

        digits = load_digits()
        images = (torch.from_numpy(digits.data).float() / 8 - 1).view(-1, 1, _SIDE, _SIDE)
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(_SPLIT_SEED))
        rows = Labelled(images, torch.from_numpy(digits.target).long())[order]
        generator = torch.Generator().manual_seed(_HELD_OUT_SEED)
        return cls(rows[:_TRAINING], distorted(rows[_TRAINING:], _HELD_OUT_ROWS, generator).to(device), device)

    @property
    def name(self) -> str:
        """Conv."""
        return "conv"

    @property
    def score(self) -> str:
        """The loss on images that training never sees."""
        return "holdout_loss"

    @property
    def rows(self) -> int | None:
        """No row comes twice."""
        return None

    @property
    def dim(self) -> int:
        """Number of pixels."""
        return _SIDE**2

    @property
    def outputs(self) -> int:
        """One logit a digit."""
        return _CLASSES

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
        return seeded(SmallConvNet, seed, self.device)

    def stream(self, seed: int) -> Stream:
        """Start the sequence of training rows.

        Args:
            seed: Fixes the sequence.

        Returns:
            The stream, at its beginning.
        """
        return Distortions(self.training, seed, self.device)

    def loss(self, model: nn.Module, batch: Labelled) -> Tensor:
        """Give the cross-entropy.

        Args:
            model: The network.
            batch: n rows.

        Returns:
            A scalar with its graph: nats, averaged over rows.
        """
        return F.cross_entropy(model(batch.images), batch.labels)

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Judge the network on held-out images.

        Args:
            model: The network.

        Returns:
            `holdout_loss`, in nats, and `holdout_error`, the share of images that are told wrongly.
        """
        logits = model(self.held_out.images)
        return {
            "holdout_loss": F.cross_entropy(logits, self.held_out.labels).item(),
            "holdout_error": (logits.argmax(1) != self.held_out.labels).float().mean().item(),
        }
