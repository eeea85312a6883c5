"""The layers of the package, held by reading its source."""

from __future__ import annotations

import ast
import importlib
import inspect
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import hessfree

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "hessfree"
FILES = sorted(PACKAGE.rglob("*.py"))
ROOMS = (
    "precision",
    "vectors",
    "matmul",
    "report",
    "distributed",
    "recording",
    "losses",
    "linearization",
    "rows",
    "operators",
    "solvers",
    "preconditioners",
    "damping",
    "line_search",
    "momentum",
    "curvature_batch",
    "curvature",
    "settings",
    "groups",
    "memory",
    "model_along",
    "attempt",
    "optimizer",
    "jacobian",
    "lightning",
)  # each imports only from rooms before it, or from itself
OPTIONAL = {  # a room may import these besides torch
    "lightning": {"lightning", "pytorch_lightning", "matplotlib"},
    "operators": {"scipy"},  # inside to_scipy, when it is called
}


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[str]:
    """Yield the modules that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relative to itself; write the module out"
            assert node.module is not None
            if node.module == "hessfree":  # from hessfree import room
                yield from (f"hessfree.{alias.name}" for alias in node.names)
            else:
                yield node.module


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", FILES, ids=named)
def test_imports_only_from_rooms_above(path: Path) -> None:
    room = room_of(path)
    if room == "__init__":
        return  # the face of the package sees every room
    assert room in ROOMS, f"{named(path)} is in no room; put it into ROOMS at the place where it belongs"
    allowed = ROOMS[: ROOMS.index(room) + 1]
    for module in imports(path):
        if module.partition(".")[0] == "hessfree":
            imported = module.split(".")[1]
            assert imported in allowed, f"{named(path)} imports {module}, a room below {room}"


@pytest.mark.parametrize(
    ("room", "known"),
    [
        ("solvers", {"matmul", "operators", "solvers"}),
        ("momentum", {"operators", "solvers"}),
        ("line_search", set()),
        ("damping", set()),
        ("report", set()),
    ],
)
def test_strategies_know_no_networks(room: str, known: set[str]) -> None:
    for path in FILES:
        if room_of(path) == room:
            inside = [module for module in imports(path) if module.startswith("hessfree.")]
            assert {module.split(".")[1] for module in inside} <= known
            assert not any(module.startswith("torch.nn") for module in imports(path))


@pytest.mark.parametrize("path", FILES, ids=named)
def test_imports_nothing_but_torch_and_the_standard_library(path: Path) -> None:
    allowed = {"torch", "hessfree"} | sys.stdlib_module_names | OPTIONAL.get(room_of(path), set())
    assert {module.partition(".")[0] for module in imports(path)} <= allowed


def test_every_room_is_there_in_this_order() -> None:
    found = {room_of(path) for path in FILES} - {"__init__"}
    assert set(ROOMS) == found


@pytest.mark.parametrize("path", FILES, ids=named)
def test_files_are_short(path: Path) -> None:
    assert 1 <= len(path.read_text().splitlines()) <= 350


@pytest.mark.parametrize("name", hessfree.__all__)
def test_public_names_exist_and_are_documented(name: str) -> None:
    thing = getattr(hessfree, name)
    assert inspect.getdoc(thing)
    if not inspect.isclass(thing):
        return
    assert "__doc__" in vars(thing) and vars(thing)["__doc__"], f"{name} inherits its docstring"
    for member, value in vars(thing).items():
        if not member.startswith("_") and callable(getattr(thing, member)):
            assert inspect.getdoc(value), f"{name}.{member} has no docstring"


def test_public_names_are_sorted_once_and_complete() -> None:
    assert len(set(hessfree.__all__)) == len(hessfree.__all__)
    imported = {
        alias.asname or alias.name
        for node in ast.parse((PACKAGE / "__init__.py").read_text()).body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert imported == set(hessfree.__all__)


def test_importing_the_package_needs_no_extra() -> None:
    for path in FILES:
        for module in imports(path):
            if module.startswith("hessfree.") and room_of(path) != "lightning":
                assert not module.startswith("hessfree.lightning")
    importlib.import_module("hessfree")


def test_experiments_are_not_in_the_wheel() -> None:
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert config["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"] == ["hessfree"]
    assert [name.partition(">")[0] for name in config["project"]["dependencies"]] == ["torch"]
    assert (PACKAGE / "py.typed").exists()
