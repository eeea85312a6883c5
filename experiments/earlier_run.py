"""What an earlier run left where a new one begins."""

import os
from collections.abc import Callable
from itertools import count
from pathlib import Path

from experiments.checkpoint import holds_unfinished
from experiments.outcome import FILES


def set_aside(out: Path, checkpoint: Path, say: Callable[[str], None]) -> None:
    """Rename what would be lost, or be taken for the new run's own.

    An unfinished run's checkpoint is the only copy of its work, and gets a name that nothing else has. Of results the
    last ones are kept.

    Args:
        out: Where results go.
        checkpoint: The file of the new run's state.
        say: Prints a line.
    """
    if holds_unfinished(checkpoint):
        kept = _free(checkpoint)
        os.replace(checkpoint, kept)
        say(
            f"an unfinished run was here: its checkpoint is now {kept}; to go on from it, move it to "
            f"{checkpoint.name} in another directory, and give that as --out, with --resume and the flags it had"
        )
    moved = []
    for path in (out / name for name in FILES):
        if path.exists():
            moved.append(path.with_suffix(f".old{path.suffix}"))
            os.replace(path, moved[-1])
    if moved:
        say(f"results of an earlier run are now {', '.join(map(str, moved))}")


def _free(path: Path) -> Path:
    """The first of name.old.pt, name.old2.pt, ... that is not taken."""
    names = (path.with_suffix(f".old{'' if n == 1 else n}{path.suffix}") for n in count(1))
    return next(name for name in names if not name.exists())
