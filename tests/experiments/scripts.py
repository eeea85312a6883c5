"""The scripts as modules, to be run inside the tests' process."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

SCRIPTS = Path(__file__).parents[2] / "scripts"


def main_of(name: str) -> Callable[[list[str]], Any]:
    """Return `main` of scripts/<name>.py."""
    spec = importlib.util.spec_from_file_location(f"{name}_script", SCRIPTS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main
