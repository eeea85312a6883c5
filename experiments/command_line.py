"""What the scripts' command lines share."""

import argparse
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage text in front of it."""

    def error(self, message: str) -> NoReturn:
        """Print the line and end with exit code 2.

        Args:
            message: What is wrong.
        """
        program = self.prog.partition(" ")[0]  # the parser of a command names that too
        self.exit(2, f"{program}: error: {message}; see --help\n")
