"""Lists of points, drawn with replacement: scikit-learn's digits, and the images of `experiments.data.images`."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from experiments.data.base import Score
from experiments.environment import UsageError
from experiments.posteriors import mixture_velocity

_DIGITS_FOR_TRAINING = 1500  # of 1797
_DIGITS_SPLIT_SEED = 7


@dataclass(frozen=True)
class FiniteSet:
    """A list of training points drawn with replacement, and a list of held-out points.

    Attributes:
        name: The name on the command line.
        training: `[K, D]`, float32.
        held_out: `[H, D]`, float32.
        score: The held-out loss: the exact field of the *training* points would only reproduce those points.
        knows_expectation: Whether a sum over all training points is cheap enough.
    """

    name: str
    training: Tensor
    held_out: Tensor
    score: Score = "holdout_loss"
    knows_expectation: bool = True

    @property
    def dim(self) -> int:
        """Number of components D of a point."""
        return self.training.shape[1]

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """Draw training points with replacement.

        Args:
            n: How many.
            generator: The source of randomness, on the CPU.

        Returns:
            Points, `[n, D]`, float32.
        """
        return self.training[torch.randint(len(self.training), (n,), generator=generator)]

    def holdout(self, n: int, generator: torch.Generator) -> Tensor:
        """Draw held-out points with replacement.

        Args:
            n: How many.
            generator: The source of randomness, on the CPU.

        Returns:
            Points, `[n, D]`, float32.
        """
        return self.held_out[torch.randint(len(self.held_out), (n,), generator=generator)]

    def conditional_expectation(self, x_t: Tensor, t: Tensor, sigma: float = 0.0) -> Tensor:
        """Give E[u | x_t, t] under the training points, in closed form.

        Args:
            x_t: Points on the path, `[n, D]`.
            t: Their times, `[n, 1]`, `[n]` or one for all.
            sigma: Standard deviation of the path's own noise.

        Returns:
            The expectation, `[n, D]`, like `x_t`.
        """
        return mixture_velocity(x_t, t, self.training, 0.0, sigma)


def digits(dim: int = 64) -> FiniteSet:
    """The 1797 handwritten digits of scikit-learn, grey values scaled from 0..16 to [-1, 1].

    Args:
        dim: 64 for the images as they are (8 x 8); 784 for images resized bilinearly to 28 x 28.

    Returns:
        1500 training and 297 held-out images, flattened; the split is fixed, whatever the seed of a run.

    Raises:
        UsageError: If `dim` is neither.
    """
    if dim not in (64, 784):
        raise UsageError(f"dim={dim!r}: digits have 64 or 784 components; choose one of these")
    from sklearn.datasets import load_digits

    images = torch.from_numpy(load_digits().data).float() / 8 - 1
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(_DIGITS_SPLIT_SEED))
    images = images[order]
    if dim == 784:
        square = images.view(-1, 1, 8, 8)
        images = F.interpolate(square, size=(28, 28), mode="bilinear", align_corners=False).flatten(1)
    name = "digits" if dim == 64 else "digits-784"
    return FiniteSet(name, images[:_DIGITS_FOR_TRAINING], images[_DIGITS_FOR_TRAINING:])
