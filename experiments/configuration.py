"""A TOML file in place of flags: each key is the name of a flag, each table holds the settings of an optimizer.

`EXAMPLE` is one. The file becomes words of a command line that stand before the user's own: flags win, and one parser
checks both.
"""

import argparse
import difflib
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from experiments.environment import UsageError

EXAMPLE = """\
data = "moons"
budget-seconds = 30
optimizers = ["hessfree", "adam"]

[hessfree]
damping = 0.1
"""


def words_of(path: Path, parser: argparse.ArgumentParser, optimizers: Iterable[str]) -> list[str]:
    """Turn a file into words of a command line.

    Args:
        path: The file.
        parser: Knows the flags.
        optimizers: The tables that may stand there.

    Returns:
        The words, in the order of the file, settings of optimizers last.

    Raises:
        UsageError: If the file cannot be read, or says what no flag could.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"--config {str(path)!r} cannot be read ({error.strerror}); give a TOML file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(
            f"--config {str(path)!r} is no TOML ({error}); see tomllib's documentation or toml.io"
        ) from None
    flags = {
        option.removeprefix("--"): action
        for action in parser._actions
        for option in action.option_strings
        if option.startswith("--") and not option.startswith("--no-")
    }
    flags = {name: action for name, action in flags.items() if name not in {"help", "config", "set"}}
    _check_alone(path, content, parser)
    tables = list(optimizers)
    words: list[str] = []
    settings: list[str] = []
    for key, value in content.items():
        name = key.replace("_", "-")
        if name in tables:
            settings += _settings(path, name, value)
        elif name in flags:
            words += _flag(path, name, value, flags[name])
        else:
            raise UsageError(f"--config {str(path)!r}: unknown key {key!r}{_hint(name, [*flags, *tables])}")
    return [*words, *(["--set", *settings] if settings else [])]


def _check_alone(path: Path, content: Iterable[str], parser: argparse.ArgumentParser) -> None:
    """Refuse two keys of which only one could count; the parser would not, as a flag may replace the file's."""
    for group in parser._mutually_exclusive_groups:
        options = {option for action in group._group_actions for option in action.option_strings}
        found = [key for key in content if f"--{key.replace('_', '-')}" in options]
        if len(found) > 1:
            raise UsageError(
                f"--config {str(path)!r}: {' and '.join(found)} stand together, and only one can count; leave one out"
            )


def _hint(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; the keys are: {', '.join(known)}"


def _settings(path: Path, optimizer: str, table: Any) -> list[str]:
    if not isinstance(table, dict):
        raise UsageError(
            f"--config {str(path)!r}: {optimizer} = {table!r} is no table; write [{optimizer}] and its settings below"
        )
    for setting, value in table.items():
        if isinstance(value, dict | list | bool):
            raise UsageError(f"--config {str(path)!r}: {optimizer}.{setting} = {value!r}; give a number or a word")
    return [f"{optimizer}.{setting.replace('-', '_')}={value}" for setting, value in table.items()]


def _flag(path: Path, name: str, value: Any, action: argparse.Action) -> list[str]:
    """The words of one key. Values go to the parser as text, as they would from a shell."""
    if isinstance(action, argparse.BooleanOptionalAction):
        if not isinstance(value, bool):
            raise UsageError(f"--config {str(path)!r}: {name} = {value!r}; give true or false")
        return [f"--{name}" if value else f"--no-{name}"]
    if action.nargs == 0:
        raise UsageError(
            f"--config {str(path)!r}: {name} = {value!r} is for one start alone; give --{name} on the command line"
        )
    several = action.nargs == "+"
    values = value if several and isinstance(value, list) else [value]
    if not values or any(isinstance(one, dict | list | bool) for one in values):
        wanted = "a list of words" if several else "one number or one text"
        raise UsageError(f"--config {str(path)!r}: {name} = {value!r}; give {wanted}")
    if several:
        return [f"--{name}", *map(str, values)]
    return [f"--{name}={value}"]  # one word, so that a negative number is no flag
