"""What TensorBoard shows while training goes on: one run an optimizer, the same tags in each.

Losses come three times: by step (`loss/excess`), by milliseconds of training (`loss/excess_vs_ms`) and by rows
(`loss/excess_vs_samples`), where the global step *is* the milliseconds or the rows: so optimizers of unequal steps can
be compared on TensorBoard's own horizontal axis. The wall time of every event is the moment of the log's opening plus
the seconds of training, so that the "relative" axis compares them as well, although they ran one after the other.

A step that goes on after the end of the budget would stretch the axis for all others. By milliseconds such a run ends
with the budget, at the loss it had then: that of before the step.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from experiments.environment import UsageError
from experiments.optimizers import Settings
from experiments.records import Budget, Point

Snapshot = Callable[[nn.Module], dict[str, Tensor]]

_PICTURES_AT = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0)  # shares of the budget
_PARTS = ("gradient", "setup", "solve", "evaluate")
_INNER_LIFE = {
    "damping λ": ["damping"],
    "reduction ratio ρ (1: the quadratic model is right)": ["reduction_ratio"],
    "iterations of conjugate gradients": ["iterations"],
    "relative residual of the solve": ["residual"],
    "norm of the step": ["step_norm"],
    "norm of the gradient": ["gradient_norm"],
    "seconds of a step, by part": [f"seconds_{part}" for part in _PARTS],
}


class TensorBoardLog:
    """Writes the points of a comparison; called with each, as an observer."""

    def __init__(
        self,
        directory: Path,
        contenders: Mapping[str, Settings],
        *,
        score: str,
        budget: Budget,
        now: float,
        snapshots: Mapping[str, Snapshot] | None = None,
        append: bool = False,
        previous: Mapping[str, Point | None] | None = None,
    ) -> None:
        """Open one writer an optimizer; the events of an earlier comparison in the same place make way.

        Args:
            directory: What `tensorboard --logdir` is to be given.
            contenders: Settings by name of the optimizer.
            score: The loss by which they are compared.
            budget: Of each.
            now: Seconds since the epoch, from which the relative axis counts.
            snapshots: Draw an optimizer's pictures from its network.
            append: Keep the events that are there: a comparison goes on.
            previous: The last point of a run that goes on, by optimizer, where it has one: written already.

        Raises:
            UsageError: If the directory cannot be written.
        """
        from torch.utils.tensorboard import SummaryWriter

        self._score, self._budget, self._now = score, budget, now
        self._snapshots = snapshots or {}
        self._pictures = {name: list(_PICTURES_AT) for name in contenders}
        self._previous = {name: point for name, point in (previous or {}).items() if point is not None}
        self._writers: dict[str, Any] = {}
        try:
            # Also those of optimizers that are not among the contenders now, or they would stay beside the new curves.
            for old in () if append else list(directory.glob("*/events.out.tfevents.*")):
                old.unlink()
            for name in contenders:
                self._writers[name] = SummaryWriter(str(directory / name))
        except OSError as error:
            raise UsageError(f"--out: {str(directory)!r} cannot be written ({error.strerror}); give another") from None
        if not append:
            next(iter(self._writers.values())).add_custom_scalars(layout(short(score)))
            self._write_settings(contenders)

    def _write_settings(self, contenders: Mapping[str, Settings]) -> None:
        """Fill the page of hyper-parameters from the runs' own directories: `add_hparams` would add empty runs."""
        from torch.utils.tensorboard.summary import hparams

        values = {name: _plain(settings) for name, settings in contenders.items()}
        metrics = {f"loss/{short(self._score)}": 0.0, "loss/train": 0.0}
        union = {key: value for one in reversed(values.values()) for key, value in one.items()}
        for index, (name, writer) in enumerate(self._writers.items()):
            experiment, start, _ = hparams(union if index == 0 else values[name], metrics)
            if index == 0:  # the columns of the table, of all runs together
                writer.file_writer.add_summary(experiment)
                _, start, _ = hparams(values[name], metrics)
            writer.file_writer.add_summary(start)
            writer.flush()

    def __call__(self, optimizer: str, point: Point, model: nn.Module) -> None:
        """Write one point of a run.

        Args:
            optimizer: The run.
            point: Its losses, and what the optimizer reports of itself.
            model: The network, for pictures.
        """
        writer, wall = self._writers[optimizer], self._now + point.seconds
        for tag, value in _losses(point, self._score).items():
            writer.add_scalar(tag, value, point.step, walltime=wall)
            writer.add_scalar(f"{tag}_vs_samples", value, point.samples, walltime=wall)
        shown, milliseconds = point, 1000 * point.seconds
        if point.seconds > self._budget.seconds:
            shown, milliseconds = self._previous.get(optimizer, point), 1000 * self._budget.seconds
        for tag, value in _losses(shown, self._score).items():
            writer.add_scalar(f"{tag}_vs_ms", value, round(milliseconds), walltime=wall)
        for tag, value in point.internals.items():
            if math.isfinite(value):  # NaN means "not needed at this step"; among losses, divergence, which is shown
                writer.add_scalar(tag, value, point.step, walltime=wall)
        self._previous[optimizer] = point
        self._draw(optimizer, point, model)
        writer.flush()

    def _draw(self, optimizer: str, point: Point, model: nn.Module) -> None:
        fraction = self._budget.fraction(point.seconds, point.step) if point.step else 0.0
        due = self._pictures[optimizer]
        if optimizer not in self._snapshots or not due or fraction < due[0]:
            return
        self._pictures[optimizer] = [moment for moment in due if moment > fraction]
        for tag, image in self._snapshots[optimizer](model).items():
            wall = self._now + point.seconds
            self._writers[optimizer].add_image(tag, image, point.step, walltime=wall, dataformats="HWC")

    def close(self) -> None:
        """Close the writers; what they wrote stays."""
        for writer in self._writers.values():
            writer.close()


def short(name: str) -> str:
    """Give a loss its name in tags.

    Args:
        name: A key of a problem's `evaluate`.

    Returns:
        `excess` for `excess_loss`.
    """
    return name.removesuffix("_loss")


def _losses(point: Point, score: str) -> dict[str, float]:
    """All losses by tag; that of the comparison once more as a logarithm, which linear axes show to its end."""
    losses = {"loss/train": point.train_loss, **{f"loss/{short(name)}": value for name, value in point.losses.items()}}
    compared = point.losses[score]
    return losses | ({f"loss/log10_{short(score)}": math.log10(compared)} if 0 < compared < math.inf else {})


def _plain(settings: Settings) -> dict[str, Any]:
    """Settings as the plugin takes them: what is None has no number, and a word would spoil the column's type."""
    values = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings) if field.repr}
    values = {name: value for name, value in values.items() if value is not None}
    return {
        name: value if isinstance(value, bool | int | float | str) else str(value) for name, value in values.items()
    }


def layout(score: str) -> dict[str, dict[str, list[Any]]]:
    """Arrange the page of custom scalars: the comparison first, then what happens inside an optimizer.

    Args:
        score: The loss of the comparison, as tags have it.

    Returns:
        Charts by title, by section. Tags are regular expressions there, matched from the start of a tag.
    """

    def chart(*tags: str) -> list[Any]:
        return ["Multiline", [f"^{tag}$" for tag in tags]]

    comparison = {}
    named = f"{score.replace('_', ' ')} loss"
    for loss, words in ((f"log10_{score}", f"log10 of {named}"), (score, named), ("train", "training loss")):
        comparison[f"{words} by milliseconds of training"] = chart(f"loss/{loss}_vs_ms")
        comparison[f"{words} by training samples"] = chart(f"loss/{loss}_vs_samples")
        comparison[f"{words} by step"] = chart(f"loss/{loss}")
    inner = {title: chart(*(f"optimizer/{name}" for name in names)) for title, names in _INNER_LIFE.items()}
    return {"Comparison": comparison, "Inside the optimizer": inner}
