"""MNIST's files, made here in the format in which torchvision keeps them."""

import importlib.util
import struct
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
from torch import Tensor

from experiments import data
from experiments.environment import UsageError
from experiments.flow_matching import Evaluation

pytest.importorskip("torchvision")


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No network, whatever the machine has."""
    import torchvision.datasets.mnist

    def fail(*args: object, **kwargs: object) -> None:
        raise URLError("Name or service not known")

    monkeypatch.setattr(torchvision.datasets.mnist, "download_and_extract_archive", fail)


def write_idx(path: Path, values: Tensor) -> None:
    """The format of LeCun's page: two zeros, the type (8: bytes), the number of axes, their big-endian lengths."""
    header = struct.pack(">BBBB", 0, 0, 8, values.dim()) + struct.pack(f">{values.dim()}I", *values.shape)
    path.write_bytes(header + bytes(values.flatten().tolist()))


def make_root(root: Path, folder: str) -> tuple[Tensor, Tensor]:
    raw = root / folder / "raw"
    raw.mkdir(parents=True)
    generator = torch.Generator().manual_seed(len(folder))
    made = []
    for kind, n in (("train", 40), ("t10k", 10)):
        grey = torch.randint(256, (n, 28, 28), generator=generator)
        grey[0, 0, :2] = torch.tensor([0, 255])
        write_idx(raw / f"{kind}-images-idx3-ubyte", grey)
        write_idx(raw / f"{kind}-labels-idx1-ubyte", torch.arange(n) % 10)
        made.append(grey)
    return made[0], made[1]


@pytest.mark.parametrize(("name", "folder"), [("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST")])
def test_read_from_a_directory(tmp_path: Path, name: str, folder: str) -> None:
    training, test = make_root(tmp_path, folder)
    dataset = data.load(name, root=tmp_path)
    assert dataset.name == name and dataset.dim == 784 and dataset.score == "holdout_loss"
    for found, grey in ((dataset.training, training), (dataset.held_out, test)):  # type: ignore[attr-defined]
        torch.testing.assert_close((found + 1) * 127.5, grey.flatten(1).float(), atol=1e-3, rtol=0)
        assert found.dtype == torch.float32 and found.min() == -1 and found.max() == 1
    # the same set by its name alone, as an optimizer asks for it
    assert data.load(name) is dataset and data.load(name, dim=784, root=tmp_path) is dataset
    assert set(Evaluation.of(dataset, n=20).losses(lambda x, t: x)) == {"holdout_loss"}


def test_offline_the_cure_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--data-root.*nowhere.*could not be downloaded.*FashionMNIST") as caught:
        data.load("fashion-mnist", root=tmp_path / "nowhere")
    message = str(caught.value)
    assert "train-images-idx3-ubyte" in message and "digits-784" in message and "\n" not in message


def test_damaged_files(tmp_path: Path) -> None:
    make_root(tmp_path, "MNIST")
    path = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UsageError, match="damaged.*delete them"):
        data.load("mnist", root=tmp_path)


def test_another_size_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--dim 64.*784"):
        data.load("mnist", 64, tmp_path)


def test_without_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r'torchvision; run: pip install -e "\.\[vision\]"'):
        data.load("mnist", root=tmp_path)
