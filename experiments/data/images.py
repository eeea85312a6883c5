"""MNIST and Fashion-MNIST at 784 grey values, by torchvision: read from a directory, or downloaded into it."""

import functools
from pathlib import Path

from torch import Tensor

from experiments.data.finite import FiniteSet
from experiments.environment import UsageError, require_extras

DEFAULT_ROOT = Path("data")
IMAGES = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST"}  # names here and in torchvision
_FILES = tuple(f"{part}-{what}" for part in ("train", "t10k") for what in ("images-idx3-ubyte", "labels-idx1-ubyte"))

# Where a set was found in this process: an optimizer that asks for its moments knows the name alone.
_found: dict[str, Path] = {}


def images(name: str, root: Path | None = None) -> FiniteSet:
    """Read a set of images, and download it first where it is not there.

    Args:
        name: One of `IMAGES`.
        root: The directory that holds torchvision's `MNIST/raw` or `FashionMNIST/raw`; None: where the set was found
            before in this process, else `DEFAULT_ROOT`.

    Returns:
        The published training and test images, flattened, grey values scaled from 0..255 to [-1, 1]. E[u | x_t, t]
        would be a sum over 60 thousand images at every point, and is not used.

    Raises:
        UsageError: If torchvision is not installed, the files are neither there nor to be had, or are not what they
            should be.
    """
    root = _found.get(name, DEFAULT_ROOT) if root is None else root
    dataset = _read(name, root)
    _found[name] = root
    return dataset


@functools.cache
def _read(name: str, root: Path) -> FiniteSet:
    require_extras(["torchvision"], extra="vision")
    from torchvision import datasets

    source = getattr(datasets, IMAGES[name])
    try:
        training, test = (source(root, train=train, download=True).data for train in (True, False))
    except (RuntimeError, OSError, AssertionError, KeyError, ValueError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UsageError(_cure(name, root, reason)) from None
    return FiniteSet(name, _scaled(training), _scaled(test), knows_expectation=False)


def _cure(name: str, root: Path, reason: str) -> str:
    """Say what to do where the images could not be read, in one line."""
    raw = root / IMAGES[name] / "raw"
    if all((raw / file).exists() for file in _FILES):
        return f"--data {name}: the files in {str(raw)!r} are damaged ({reason}); delete them to download them anew"
    return (
        f"--data {name} is not in --data-root {str(root)!r} and could not be downloaded ({reason}); put "
        f"{', '.join(_FILES)} into {str(raw)!r}, name another directory by --data-root, or take --data digits-784, "
        f"which needs no network"
    )


def _scaled(images: Tensor) -> Tensor:
    return images.flatten(1).float() / 127.5 - 1
