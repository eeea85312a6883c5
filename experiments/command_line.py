"""What the scripts' command lines share."""

import argparse
from pathlib import Path
from typing import NoReturn


def home_path(text: str) -> Path:
    """Read a path, its ~ expanded: after `=`, and in a file, no shell does that.

    Args:
        text: The path.

    Returns:
        The path.

    Raises:
        ArgumentTypeError: If there is no such home.
    """
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"{text!r}: nobody's home is known by that name; write the path out") from None


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage text in front of it."""

    def error(self, message: str) -> NoReturn:
        """Print the line and end with exit code 2.

        Args:
            message: What is wrong.
        """
        program = self.prog.partition(" ")[0]  # the parser of a command names that too
        self.exit(2, f"{program}: error: {message}; see --help\n")
