"""The main job: optimizers side by side on flow matching, with everything that is left to look at afterwards."""

import dataclasses
import math
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from experiments import data
from experiments.checkpoint import Checkpoint
from experiments.comparison import SWEEP_SHARE, Trainer, compare
from experiments.earlier_run import set_aside
from experiments.environment import UsageError, choose_device, describe, prepare_directory, require_extras
from experiments.interruption import Interrupted, Interruption
from experiments.optimizers import Settings, check_buildable, check_names, choose_settings, default_optimizers
from experiments.outcome import write_outcome
from experiments.paths import Coupling, Paths, Times
from experiments.pictures import View, snapshot
from experiments.problems.flow import TARGETS, Flow, Target, make_flow
from experiments.progress import Progress
from experiments.records import Budget, Run
from experiments.results import LIGHTNING, PLAIN, score_name
from experiments.sampling import Method, Sampler
from experiments.tensorboard_log import TensorBoardLog
from experiments.training import last_point

_SECONDS = 12.0


@dataclass(frozen=True, kw_only=True)
class Job:
    """What the user asks for.

    Attributes:
        data: Name of the data set.
        dim: Dimension, for data that have a choice.
        data_root: Where files of data are, or shall go.
        target: "raw", "stable" (Rao-Blackwellised) or "fixed" (4096 rows with the exact target).
        sigma: Of the paths' own noise.
        coupling: Of noise and data.
        times: How times are drawn.
        width: Of the hidden layers.
        hidden_layers: Number of these.
        optimizers: Names, in running order; None: those that suit the data.
        budget_seconds: Seconds of training for each; None: 12, or `budget_steps`.
        budget_steps: Steps of each, in place of seconds.
        seed: Fixes initial weights and data.
        device: "auto" or a torch device.
        out: Directory for what is written; None: runs/<problem>.
        assignments: Changed settings, as "optimizer.setting=value".
        sampler: The rule by which samples are drawn.
        sampler_steps: Its steps.
        sampler_tolerance: The tolerance of the adaptive rule.
        lightning: Whether Lightning's Trainer makes the runs.
        resume: Whether to go on where an earlier process was.
    """

    data: str = "8gaussians"
    dim: int | None = None
    data_root: Path | None = None
    target: Target = "raw"
    sigma: float = 0.0
    coupling: Coupling = "independent"
    times: Times = "uniform"
    width: int = 64
    hidden_layers: int = 3
    optimizers: Sequence[str] | None = None
    budget_seconds: float | None = None
    budget_steps: int | None = None
    seed: int = 0
    device: str = "auto"
    out: Path | None = None
    assignments: Sequence[str] = ()
    sampler: Method = "midpoint"
    sampler_steps: int = 50
    sampler_tolerance: float = 1e-5
    lightning: bool = False
    resume: bool = False

    def budget(self) -> Budget:
        """Give the budget of each optimizer.

        Returns:
            The budget.

        Raises:
            UsageError: If it is no time to train.
        """
        if self.budget_steps is not None:
            if self.budget_steps < 1:
                raise UsageError(f"--budget-steps {self.budget_steps} is no training; give a positive number")
            return Budget(steps=self.budget_steps)
        seconds = _SECONDS if self.budget_seconds is None else self.budget_seconds
        if not (math.isfinite(seconds) and seconds > 0):
            raise UsageError(f"--budget-seconds {seconds:g} is no time to train; give a positive number")
        return Budget(seconds)

    def problem(self) -> Flow:
        """Read the data and set up what is to be solved.

        Returns:
            The problem.

        Raises:
            UsageError: If there is no such problem.
        """
        for name, size in (("--width", self.width), ("--hidden-layers", self.hidden_layers)):
            if size < 1:
                raise UsageError(f"{name} {size} makes no network; give a positive number")
        if self.target not in TARGETS:
            raise UsageError(f"--target {self.target!r} is unknown; choose one of: {', '.join(TARGETS)}")
        paths = Paths(sigma=self.sigma, coupling=self.coupling, times=self.times)
        device = choose_device(self.device)
        dataset = data.load(self.data, self.dim, self.data_root)
        return make_flow(self.target, dataset, device, paths=paths, width=self.width, n_hidden=self.hidden_layers)

    def trainer(self) -> Trainer | None:
        """Choose what makes the runs.

        Returns:
            Lightning's way, or None for the plain loop.

        Raises:
            UsageError: If Lightning is not installed.
        """
        if not self.lightning:
            return None
        require_extras(["lightning"], extra="lightning")
        from experiments.lightning_training import train_on_lightning

        return train_on_lightning

    def deciding(self) -> dict[str, object]:
        """Give what decides the results, as plain values: a run that goes on must have been asked for the same."""
        asked = dataclasses.asdict(self) | {"data_root": None, "optimizers": list(self.optimizers or ())}
        asked["assignments"] = sorted(self.assignments)
        free = {"out", "resume", "device", "data_root", "sampler", "sampler_steps", "sampler_tolerance"}
        return {name: value for name, value in asked.items() if name not in free}


def run_job(job: Job) -> list[Run]:
    """Check everything the user asked for, train, write results and print the table.

    Args:
        job: What the user asks for.

    Returns:
        One run an optimizer.

    Raises:
        UsageError: Before any training, if something asked for is not possible.
        Interrupted: If the user asked to stop; how to go on has been said.
        KeyboardInterrupt: If they asked a second time; the same, unless nothing had been done.
    """
    budget = job.budget()
    if not 0 <= job.seed < 2**31:
        raise UsageError(f"--seed {job.seed} is out of range; give an integer from 0 to {2**31 - 1}")
    sampler = Sampler(method=job.sampler, steps=job.sampler_steps, tolerance=job.sampler_tolerance)
    require_extras()
    trainer = job.trainer()
    check_names(job.optimizers, job.assignments)
    problem = job.problem()
    optimizers = job.optimizers if job.optimizers is not None else default_optimizers(problem)
    contenders = choose_settings(optimizers, job.assignments, problem)
    model = problem.initial_model(job.seed)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    for settings in contenders.values():
        settings.check(parameters)
    check_buildable(contenders, job.assignments, problem)
    out = prepare_directory(job.out if job.out is not None else Path("runs") / problem.name)
    checkpoint = _checkpoint(job, out)
    _announce(job, problem, model, contenders, budget)
    view = View.of(problem)
    log = TensorBoardLog(
        out / "tensorboard",
        contenders,
        score=problem.score,
        budget=budget,
        now=checkpoint.started,
        snapshots={name: snapshot(view, name) for name in contenders},
        append=job.resume,
        previous={name: last_point(checkpoint.state_of(name)) for name in contenders},
    )
    loop = LIGHTNING if job.lightning else PLAIN
    try:
        runs = _supervised(job, problem, contenders, budget, checkpoint, log, trainer)
        write_outcome(out, problem, runs, view=view, sampler=sampler, loop=loop, say=_say)
    except (Interrupted, KeyboardInterrupt) as stop:
        _say_how_to_go_on(checkpoint, stop)
        raise
    checkpoint.finish()
    # The page smooths by default, which drags few points behind themselves; the address switches that off.
    _say("in TensorBoard: http://localhost:6006/?smoothing=0#custom_scalars&_smoothingWeight=0")
    _say(f"tensorboard --logdir {out / 'tensorboard'}")
    return runs


def _checkpoint(job: Job, out: Path) -> Checkpoint:
    """Read the state of the run that goes on, or begin one, which overwrites nothing that is worth keeping."""
    path = out / "checkpoint.pt"
    if job.resume:
        return Checkpoint.load(path, job.deciding())
    set_aside(out, path, _say)
    return Checkpoint(path, job.deciding(), started=time.time())


def _say_how_to_go_on(checkpoint: Checkpoint, stop: BaseException) -> None:
    if checkpoint.path is None or not checkpoint.path.exists():
        return  # stopped at once, before the first save
    again = sys.argv if "--resume" in sys.argv else [*sys.argv, "--resume"]
    what = "stopped; everything so far" if isinstance(stop, Interrupted) else "stopped at once; what was saved last"
    _say(f"{what} is in {checkpoint.path}. To go on: python {shlex.join(again)}")


def _supervised(
    job: Job,
    problem: Flow,
    contenders: Mapping[str, Settings],
    budget: Budget,
    checkpoint: Checkpoint,
    log: TensorBoardLog,
    trainer: Trainer | None,
) -> list[Run]:
    """Make the runs; Ctrl-C leaves a checkpoint."""
    progress = Progress()
    checkpoint.save()
    try:
        with Interruption() as interruption:
            checkpoint.listen(interruption)
            return compare(
                problem,
                dict(contenders),
                seed=job.seed,
                budget=budget,
                observers=[log],
                say=_say,
                checkpoint=checkpoint,
                watch=progress.watch,
                trainer=trainer,
            )
    finally:
        progress.close()
        log.close()


def _say(line: str) -> None:
    print(line, flush=True)


def _announce(job: Job, problem: Flow, model: nn.Module, contenders: Mapping[str, Settings], budget: Budget) -> None:
    parameters = sum(parameter.numel() for parameter in model.parameters())
    environment = describe(problem.device)
    _say(
        f"{problem.name}: {problem.dim} dimensions, {type(model).__name__} with {parameters} parameters, "
        f"seed {job.seed}, {environment['device']} ({environment['threads']} threads), torch {environment['torch']}"
    )
    swept = [name for name, settings in contenders.items() if settings.lr is None]
    line = f"{budget} of training each for {', '.join(contenders)}"
    if swept:
        line += f"; {budget.share(SWEEP_SHARE)} for each learning rate tried for {', '.join(swept)}"
    _say(f"{line}; compared by {score_name(problem.score)}{'; on Lightning' if job.lightning else ''}")
