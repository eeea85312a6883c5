from pathlib import Path

import pytest
import torch

from experiments import environment
from experiments.environment import UsageError, choose_device, prepare_directory, require_extras


def test_auto_is_the_best_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert choose_device("auto") == choose_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert choose_device("auto") == torch.device("mps")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device("auto") == torch.device("cuda")


def test_devices_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="'cuda'.*not available.*cpu"):
        choose_device("cuda")
    with pytest.raises(UsageError, match="'abacus'.*no device.*auto"):
        choose_device("abacus")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(UsageError, match="'cuda:2'"):
        choose_device("cuda:2")


def test_directory_is_made_and_left_empty(tmp_path: Path) -> None:
    path = prepare_directory(tmp_path / "a" / "b")
    assert path.is_dir() and not list(path.iterdir())
    assert prepare_directory(path) == path


def test_directory_that_cannot_be(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    for path in (file, file / "below"):
        with pytest.raises(UsageError, match="cannot be written.*give a directory"):
            prepare_directory(path)


def test_missing_extras_name_the_command() -> None:
    require_extras()
    with pytest.raises(UsageError, match=r'no_such_package; run: pip install -e "\.\[experiments\]"'):
        require_extras(["sklearn", "no_such_package"])


def test_description_is_plain() -> None:
    description = environment.describe(torch.device("cpu"))
    assert description["device"] == "cpu" and description["threads"] == torch.get_num_threads()
