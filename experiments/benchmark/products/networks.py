"""The networks of the product benchmark that are not perceptrons."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ConvNet(nn.Module):
    """Two 3x3 convolutions with ReLU and max-pooling, and a linear layer.

    Args:
        channels: Output channels of the two convolutions.
        side: Height and width of an image, divisible by 4.
        classes: Number of logits.
    """

    def __init__(self, channels: tuple[int, int] = (16, 32), side: int = 32, classes: int = 10) -> None:
        """Build the layers with torch's default initial weights."""
        super().__init__()
        self.first = nn.Conv2d(3, channels[0], 3, padding=1)
        self.second = nn.Conv2d(channels[0], channels[1], 3, padding=1)
        self.last = nn.Linear(channels[1] * (side // 4) ** 2, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits `[N, classes]` of images `[N, 3, side, side]`."""
        x = F.max_pool2d(F.relu(self.first(x)), 2)
        x = F.max_pool2d(F.relu(self.second(x)), 2)
        return self.last(x.flatten(1))


class Block(nn.Module):
    """A pre-norm transformer block: causal attention, then a perceptron four times as wide (Radford et al. 2019).

    Args:
        width: Components of a token.
        heads: Attention heads, a divisor of `width`.
    """

    def __init__(self, width: int, heads: int) -> None:
        """Build the layers with torch's default initial weights."""
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.expand, self.contract = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return tokens `[B, T, width]` for tokens of the same shape."""
        batch, length, width = x.shape
        heads = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.project(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.contract(F.gelu(self.expand(self.norm2(x))))


class Transformer(nn.Module):
    """A causal language model without dropout.

    Args:
        width: Components of a token.
        layers: Number of blocks.
        heads: Attention heads.
        vocabulary: Number of tokens that exist.
        length: Tokens of a sequence.
    """

    def __init__(
        self, width: int = 128, layers: int = 2, heads: int = 4, vocabulary: int = 64, length: int = 64
    ) -> None:
        """Build the layers with torch's default initial weights."""
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.places = nn.Parameter(0.02 * torch.randn(length, width))
        self.heads, self.layers = heads, layers
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits `[B * T, vocabulary]` that follow the tokens `[B, T]`, one row a token."""
        x = self.tokens(tokens) + self.places
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)).flatten(0, 1)
