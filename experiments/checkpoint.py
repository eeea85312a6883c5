"""What a comparison needs to go on after it was killed: the runs that are done, and the one in progress."""

import dataclasses
import os
import time
from pathlib import Path
from typing import Any, cast

import torch

from experiments.environment import UsageError
from experiments.interruption import Interrupted, Interruption
from experiments.optimizers import Settings
from experiments.records import Point, Run, Trial
from experiments.training import Training

_EVERY_SECONDS = 5.0  # what a killed run loses at most, between two steps


class Checkpoint:
    """The state of a comparison, in memory and in a file.

    Attributes:
        path: The file; None: nothing is written.
        started: When the comparison began, in seconds since the epoch.
    """

    def __init__(self, path: Path | None, asked: dict[str, Any], started: float = 0.0) -> None:
        """Begin with nothing done.

        Args:
            path: The file; None: nothing is written.
            asked: What the user asked for, as plain values, where it decides the results.
            started: When the comparison began.
        """
        self.started = started
        self.path = path
        self._asked = asked
        self._interruption: Interruption | None = None
        self._content: dict[str, Any] = {"runs": {}, "trials": {}, "running": None, "finished": False}
        self._points = 0
        self._last = time.monotonic()

    @classmethod
    def load(cls, path: Path, asked: dict[str, Any]) -> "Checkpoint":
        """Read what an earlier process wrote.

        Args:
            path: The file.
            asked: What the user asks for now.

        Returns:
            The state.

        Raises:
            UsageError: If there is no such file, it cannot be read, or something else was asked for.
        """
        if not path.exists():
            raise UsageError(
                f"--resume: {str(path)!r} is not there to go on from; leave --resume out, or name its --out"
            )
        try:
            content = _read(path)
            found = content.pop("asked")
            checkpoint = cls(path, asked, content.pop("started"))
        except Exception as error:  # whatever unpickling makes of a damaged file
            raise UsageError(
                f"--resume: {str(path)!r} cannot be read ({type(error).__name__}); leave --resume out"
            ) from None
        differing = [name for name in found.keys() | asked.keys() if found.get(name) != asked.get(name)]
        if differing:
            raise UsageError(
                f"--resume: {str(path)!r} was written with another {', '.join(sorted(differing))}; give the same "
                f"options, or leave --resume out to start over"
            )
        checkpoint._content = content
        return checkpoint

    def listen(self, interruption: Interruption) -> None:
        """Stop at the end of a step when asked to.

        Args:
            interruption: Its flag is looked at after every step.
        """
        self._interruption = interruption

    def run_of(self, name: str, settings: Settings) -> Run | None:
        """Give a run that is done.

        Args:
            name: The optimizer.
            settings: Its settings; a learning rate that was found takes its place in them.

        Returns:
            The run; None if it is not done.
        """
        kept = self._content["runs"].get(name)
        if kept is None:
            return None
        return Run(
            name,
            dataclasses.replace(cast(Any, settings), lr=kept["lr"]),
            kept["seed"],
            kept["budget_seconds"],
            tuple(Point(**point) for point in kept["points"]),
            tuple(Trial(**trial) for trial in kept["sweep"]),
            kept["weights"],
        )

    def add_run(self, run: Run) -> None:
        """Keep a run that is done.

        Args:
            run: The run.
        """
        self._content["runs"][run.optimizer] = {
            "lr": run.settings.lr,
            "seed": run.seed,
            "budget_seconds": run.budget_seconds,
            "points": [dataclasses.asdict(point) for point in run.points],
            "sweep": [dataclasses.asdict(trial) for trial in run.sweep],
            "weights": run.weights,
        }
        self._content["running"] = None
        self.save()

    def trials_of(self, name: str) -> list[Trial]:
        """Give the trials of a sweep that are done.

        Args:
            name: The optimizer.

        Returns:
            The trials, in the order of the sweep.
        """
        return [Trial(**trial) for trial in self._content["trials"].get(name, [])]

    def add_trial(self, name: str, trial: Trial) -> None:
        """Keep a trial that is done.

        Args:
            name: The optimizer.
            trial: The trial.
        """
        self._content["trials"].setdefault(name, []).append(dataclasses.asdict(trial))
        self.save()

    def state_of(self, name: str) -> dict[str, Any] | None:
        """Give the state of the run in progress.

        Args:
            name: The optimizer.

        Returns:
            From `Training.state_dict`; None if this run has not begun.
        """
        running = self._content["running"]
        return running["state"] if running is not None and running["optimizer"] == name else None

    def watch(self, training: Training) -> None:
        """Look after a run that is to be resumed where it was: called after every step.

        Args:
            training: The run.

        Raises:
            Interrupted: If the user asked to stop; the state is written then.
        """
        if training.done:
            return  # the run itself is kept next
        stop = self._interruption is not None and self._interruption.requested
        fresh = len(training.points) != self._points  # what a curve shows is never ahead of the file
        if stop or fresh or time.monotonic() - self._last > _EVERY_SECONDS:
            self._points = len(training.points)
            if self.path is not None:
                self._content["running"] = {"optimizer": training.task.name, "state": training.state_dict()}
                self.save()
        if stop:
            raise Interrupted

    def watch_trial(self, training: Training) -> None:
        """Look after a trial, which is short enough to be repeated: called after every step.

        Args:
            training: The trial.

        Raises:
            Interrupted: If the user asked to stop.
        """
        if self._interruption is not None and self._interruption.requested and not training.done:
            raise Interrupted

    def finish(self) -> None:
        """Keep that the comparison is done, and its results written: nobody will miss this file."""
        self._content["finished"] = True
        self.save()

    def save(self) -> None:
        """Replace the file in one go."""
        self._last = time.monotonic()
        if self.path is None:
            return
        beside = self.path.with_suffix(".part")
        torch.save(self._content | {"asked": self._asked, "started": self.started}, beside)
        os.replace(beside, self.path)


def holds_unfinished(path: Path) -> bool:
    """Tell whether a file holds work that its comparison has not brought to an end.

    Args:
        path: The file, which need not be there.

    Returns:
        Whether something was done, and `Checkpoint.finish` was not called; True where the file cannot be read.
    """
    if not path.exists():
        return False
    try:
        content = _read(path)
        return not content.get("finished") and any(content.get(part) for part in ("runs", "trials", "running"))
    except Exception:  # whatever unpickling makes of it: not ours to throw away
        return True


def _read(path: Path) -> dict[str, Any]:
    return torch.load(path, map_location="cpu", weights_only=True)
