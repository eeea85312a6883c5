"""What the machine and its user provide: devices, installed extras, a place to write; and errors worth one line."""

import importlib.util
import platform
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch

# Import names of what `pip install -e ".[experiments]"` brings.
EXTRAS = ("matplotlib", "ot", "sklearn", "tensorboard", "torchdiffeq", "tqdm")


class UsageError(ValueError):
    """Wrong input from the user: the message names the value, the reason and the cure in one line."""


def require_extras(names: Iterable[str] = EXTRAS, extra: str = "experiments") -> None:
    """Check that the optional packages are there before an hour is spent on training.

    Args:
        names: Import names of top-level packages.
        extra: The extra of this project that brings them.

    Raises:
        UsageError: If one is missing.
    """
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f'not installed: {", ".join(missing)}; run: pip install -e ".[{extra}]"')


def choose_device(name: str) -> torch.device:
    """Turn a device name into a device that works here.

    Args:
        name: "auto" (the first available of cuda, mps and cpu) or anything `torch.device` takes.

    Returns:
        The device.

    Raises:
        UsageError: If torch does not know the name or the machine does not have the device.
    """
    available = ["cpu"]
    if torch.backends.mps.is_available():
        available.insert(0, "mps")
    if torch.cuda.is_available():
        available.insert(0, "cuda")
    if name == "auto":
        return torch.device(available[0])
    cure = f"choose auto or one of: {', '.join(available)}"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"--device {name!r} is no device that torch knows; {cure}") from None
    count = torch.cuda.device_count() if device.type == "cuda" else 1
    if device.type not in available or (device.index or 0) >= count:
        raise UsageError(f"--device {name!r} is not available on this machine; {cure}")
    return device


def synchronize(device: torch.device) -> None:
    """Wait until an accelerator has finished, so that a clock read afterwards tells the truth.

    Args:
        device: Where the work was queued; nothing happens on the CPU.
    """
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def prepare_directory(path: Path) -> Path:
    """Create a directory and prove that files can be written there.

    Writing a file is the proof: permission bits mean nothing to root, a read-only or full disk has no bit.

    Args:
        path: The directory; parents are created too.

    Returns:
        The same path.

    Raises:
        UsageError: If the directory cannot be created or written.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path) as file:
            file.write(b"\0")
    except OSError as error:
        reason = error.strerror or str(error)
        raise UsageError(f"--out {str(path)!r} cannot be written ({reason}); give a directory that can") from None
    return path


def describe(device: torch.device) -> dict[str, str | int]:
    """Describe what a timing depends on.

    Args:
        device: Where the training runs.

    Returns:
        Names and versions, for the record beside the figures.
    """
    description: dict[str, str | int] = {
        "device": str(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }
    if device.type == "cuda":
        description["device_name"] = torch.cuda.get_device_name(device)
    return description
