"""HessianFreeMonitor: a Trainer's callback that shows what every step did."""

from __future__ import annotations

import importlib.util
import math
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from hessfree.lightning.accumulation import Accumulation
from hessfree.lightning.base import callback_classes
from hessfree.lightning.pages import hyperparameters, scalars, show_residuals, table
from hessfree.lightning.stagnation import Stagnation
from hessfree.optimizer import HessianFree
from hessfree.report import StepReport

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer
else:
    Callback = type("Callback", callback_classes(), {})

IN_PROGRESS_BAR: dict[str, tuple[str, Callable[[float], float]]] = {
    "damping": ("log10_damping", math.log10),  # bars show three decimals, and a damping may be 1e-6
    "reduction_ratio": ("rho", float),
    "iterations": ("cg", float),
}


class _Watched:
    """One HessianFree of a Trainer, and what it did since the monitor last looked."""

    def __init__(self, optimizer: HessianFree, prefix: str) -> None:
        self.optimizer = optimizer
        self.prefix = prefix
        self.fresh: list[StepReport] = []  # of this batch
        self.shown: list[StepReport] = []  # since the last figure
        self.bar: dict[str, float] = {}
        self.micro_batches = 0
        self.backend = ""
        self.accumulation: Accumulation | None = None  # where micro-batches are taken together
        self.handles = [
            optimizer.register_step_pre_hook(lambda _, args, kwargs: self._gather(args, kwargs)),
            optimizer.register_step_post_hook(lambda *_: self._note()),
        ]

    def collect(self, trainer: Trainer, module: LightningModule) -> None:
        """Take micro-batches together from now on, unless the optimizer looks at a part of a batch only."""
        if self.optimizer.settings.curvature_batch is None and self.optimizer.settings.microbatch is None:
            self.accumulation = Accumulation(trainer, module)

    def stop(self) -> None:
        """Take the hooks off the optimizer."""
        for handle in self.handles:
            handle.remove()

    def _gather(self, args: Any, kwargs: dict[str, Any]) -> Any:
        """Give the step a closure of all micro-batches in the place of that of the last."""
        if self.accumulation is None or "closure" not in kwargs:
            return None
        closure = self.accumulation.together(kwargs["closure"], self.optimizer)
        if closure is None:
            return None
        self.micro_batches = 0  # the gradient is that of the closure
        return args, kwargs | {"closure": closure}

    def _note(self) -> None:
        if self.accumulation is not None:
            self.accumulation.clear()
        if self.optimizer.last_step is not None:
            self.fresh.append(self.optimizer.last_step)


class HessianFreeMonitor(Callback):
    """Shows what `HessianFree` does at every step; add it to the Trainer's `callbacks`, and that is all.

    Every step, each logger gets the numbers of `StepReport` under `hessfree/`: loss before and after, damping, ρ,
    iterations and final residual, gradient and step norms, accepted, back end (0 none, 1 graph, 2 functional,
    3 traced), seconds in gradient, set-up, solver and evaluations. A number that a step did not need (with the default
    damping rule, the loss after four steps in five) is not logged for it. They are in `trainer.callback_metrics` too,
    for `ModelCheckpoint(monitor="hessfree/damping")`. Damping, ρ and CG iterations are in the progress bar. With
    TensorBoard, every `every_n_steps` there is a histogram of final residuals and a figure of the residual's way down,
    and the settings stand under Text and HParams.

    With `accumulate_grad_batches=k` a step holds the graphs of all k micro-batches at once, as one on a whole batch
    does, and takes 2k − 1 gradients; `whole_batches=False` goes back to the curvature of the last micro-batch. That one
    is all that a step's closure has, so the others are evaluated once more within the step, unseen by logs and hooks:
    gradient, curvature and ρ are those of a whole batch. Noise is drawn again as it was, from torch's, Python's and
    numpy's global generators and from each `torch.Generator` that is an attribute of the LightningModule or a part of
    it. Hooks that change gradients act on the sum: what they do to the gradient of earlier micro-batches is undone.
    With `whole_batches=False`, or where the optimizer has a `curvature_batch` or a `microbatch`, curvature and ρ are
    the last micro-batch's, as they are without this callback; the optimizer is told of how many `p.grad` is the sum.

    With several optimizers of the kind, their numbers are under `hessfree/0/`, `hessfree/1/`, by their places among
    the Trainer's optimizers. Works in `lightning` and `pytorch_lightning`.
    """

    def __init__(
        self,
        every_n_steps: int = 50,
        patience: int | None = None,
        tolerance: float = 1e-6,
        whole_batches: bool = True,
    ) -> None:
        """Set up the callback.

        Args:
            every_n_steps: Optimizer steps between histograms and figures, each of which takes a tenth of a second.
            patience: Stop the Trainer after so many steps in a row that gained nothing: rejected, or with a decrease
                of their own loss below `tolerance`. None never does.
            tolerance: A part of the loss.
            whole_batches: Take micro-batches of an accumulated gradient together for one step; False has the graph of
                one at a time.

        Raises:
            ValueError: A number is out of range.
        """
        super().__init__()
        if not isinstance(every_n_steps, int) or isinstance(every_n_steps, bool) or every_n_steps < 1:
            raise ValueError(f"every_n_steps={every_n_steps!r} must be an integer >= 1")
        self.every_n_steps = every_n_steps
        self.whole_batches = whole_batches
        self.stagnation = Stagnation(patience, tolerance)
        self.stagnant_steps: dict[str, int] = {}
        self._watched: list[_Watched] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the optimizers, and log their settings."""
        ours = [(i, o) for i, o in enumerate(trainer.optimizers) if isinstance(o, HessianFree)]
        if not ours:
            names = [type(o).__name__ for o in trainer.optimizers]
            warnings.warn(
                f"HessianFreeMonitor has nothing to show: the optimizers are {names}, and none is a HessianFree",
                UserWarning,
                stacklevel=2,
            )
        self._unwatch()
        self._watched = [_Watched(o, f"hessfree/{i}/" if len(ours) > 1 else "hessfree/") for i, o in ours]
        for watched in self._watched:
            if self.whole_batches:
                watched.collect(trainer, pl_module)
            known = dict(pl_module.hparams_initial) if pl_module._log_hyperparams else {}
            settings = {watched.prefix + name: value for name, value in hyperparameters(watched.optimizer).items()}
            for logger in trainer.loggers:
                logger.log_hyperparams(known | settings)
                _write_text(logger, trainer, f"{watched.prefix}settings", table(settings))
        has_figures = any(hasattr(_writer(logger, trainer), "add_figure") for logger in trainer.loggers)
        if has_figures and not importlib.util.find_spec("matplotlib"):
            warnings.warn("HessianFreeMonitor draws no figures: pip install matplotlib", UserWarning, stacklevel=2)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Note a micro-batch."""
        for watched in self._watched:
            if watched.accumulation is not None:
                watched.accumulation.begin(batch, batch_idx)

    def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Begin to count micro-batches."""
        for watched in self._watched:
            watched.micro_batches = 0
            if watched.accumulation is not None:
                watched.accumulation.clear()

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count a micro-batch."""
        for watched in self._watched:
            watched.micro_batches += 1
            if watched.accumulation is not None:
                watched.accumulation.keep()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Tell the optimizer how many there were; under manual optimization it is the user who knows."""
        for watched in self._watched:
            if pl_module.automatic_optimization:
                watched.optimizer.accumulated_batches = max(watched.micro_batches, 1)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Show the steps that this batch led to; stop where they lead nowhere."""
        for watched in self._watched:
            reports, watched.fresh = watched.fresh, []
            for report in reports:
                self._show(trainer, watched, report)
                count = self.stagnation.count(self.stagnant_steps.get(watched.prefix, 0), report)
                self.stagnant_steps[watched.prefix] = count
                if self.stagnation.reached(count) and not trainer.should_stop:
                    self._stop(trainer, count, report)
            if watched.bar and not trainer.barebones:
                pl_module.log_dict(watched.bar, prog_bar=True, logger=False, on_step=True, on_epoch=False)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the optimizers."""
        self._unwatch()

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs."""
        return {"stagnant_steps": dict(self.stagnant_steps)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self.stagnant_steps = state_dict["stagnant_steps"]

    def _unwatch(self) -> None:
        for watched in self._watched:
            watched.stop()
            watched.optimizer.accumulated_batches = None
        self._watched = []

    def _show(self, trainer: Trainer, watched: _Watched, report: StepReport) -> None:
        step, known = trainer.fit_loop.epoch_loop._batches_that_stepped, scalars(report)
        numbers = {watched.prefix + name: value for name, value in known.items()}
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in numbers.items()})
        several = watched.prefix.removeprefix("hessfree/")
        for name, (short, shown) in IN_PROGRESS_BAR.items():
            if name in known:
                watched.bar[several + short] = shown(known[name])
        watched.shown.append(report)
        due = report.step % self.every_n_steps == 0
        for logger in trainer.loggers:
            logger.log_metrics(numbers, step=step)
            if report.backend not in {"none", watched.backend}:
                _write_text(logger, trainer, f"{watched.prefix}cut", f"{report.backend}: {report.cut}", step)
            if due:
                show_residuals(_writer(logger, trainer), watched.prefix, watched.shown, step)
        watched.backend = watched.backend if report.backend == "none" else report.backend
        watched.shown = [] if due else watched.shown

    def _stop(self, trainer: Trainer, count: int, report: StepReport) -> None:
        trainer.should_stop = True
        warnings.warn(
            f"HessianFreeMonitor stops the training: {count} steps in a row were rejected or lowered "
            f"their loss by less than {self.stagnation.tolerance:g} of it (patience={self.stagnation.patience}). "
            f"The last: {report}",
            UserWarning,
            stacklevel=2,
        )


def _writer(logger: Any, trainer: Trainer) -> Any:
    """Return what a logger writes with; None on other ranks than the first, where there is nothing to write to."""
    return getattr(logger, "experiment", None) if trainer.is_global_zero else None


def _write_text(logger: Any, trainer: Trainer, name: str, text: str, step: int = 0) -> None:
    writer = _writer(logger, trainer)
    if hasattr(writer, "add_text"):
        writer.add_text(name, text, step)
