"""The main job: optimizers side by side on flow matching, with everything that is left to look at afterwards."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from experiments import data
from experiments.comparison import SWEEP_SHARE, compare
from experiments.environment import UsageError, choose_device, describe, prepare_directory, require_extras
from experiments.optimizers import Settings, choose_settings, default_optimizers
from experiments.plots import write_curves
from experiments.problems.base import Problem
from experiments.problems.flow import FlowMatching
from experiments.results import TensorBoardLog, score_name, table, write_json
from experiments.training import Run


@dataclass(frozen=True, kw_only=True)
class Job:
    """What the user asks for.

    Attributes:
        data: Name of the data set.
        dim: Dimension, for data that have a choice.
        optimizers: Names, in running order; None: those that suit the data.
        budget_seconds: Seconds of training for each.
        seed: Fixes initial weights and data.
        device: "auto" or a torch device.
        out: Directory for what is written; None: runs/<data>.
        assignments: Changed settings, as "optimizer.setting=value".
    """

    data: str = "8gaussians"
    dim: int | None = None
    optimizers: Sequence[str] | None = None
    budget_seconds: float = 12.0
    seed: int = 0
    device: str = "auto"
    out: Path | None = None
    assignments: Sequence[str] = ()


def run_job(job: Job) -> list[Run]:
    """Check everything the user asked for, train, write results and print the table.

    Args:
        job: What the user asks for.

    Returns:
        One run an optimizer.

    Raises:
        UsageError: Before any training, if something asked for is not possible.
    """
    if not (math.isfinite(job.budget_seconds) and job.budget_seconds > 0):
        raise UsageError(f"--budget-seconds {job.budget_seconds:g} is no time to train; give a positive number")
    if not 0 <= job.seed < 2**31:
        raise UsageError(f"--seed {job.seed} is out of range; give an integer from 0 to {2**31 - 1}")
    require_extras()
    device = choose_device(job.device)
    dataset = data.load(job.data, job.dim)
    problem = FlowMatching.of(dataset, device)
    optimizers = job.optimizers if job.optimizers is not None else default_optimizers(problem)
    contenders = choose_settings(optimizers, job.assignments, problem)
    model = problem.initial_model(job.seed)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    for settings in contenders.values():
        settings.check(parameters)
    out = prepare_directory(job.out if job.out is not None else Path("runs") / dataset.name)
    _announce(job, problem, model, contenders)
    log = TensorBoardLog(out / "tensorboard", list(contenders), time.time())
    try:
        runs = compare(problem, contenders, seed=job.seed, budget_seconds=job.budget_seconds, observers=[log], say=_say)
    finally:
        log.close()
    paths = [
        write_json(out / "results.json", problem, runs),
        write_curves(out / "curves.png", problem, runs),
    ]
    _say(f"\n{table(problem, runs)}\n")
    for path in paths:
        _say(f"wrote {path}")
    _say(f"tensorboard --logdir {out / 'tensorboard'}")
    return runs


def _say(line: str) -> None:
    print(line, flush=True)


def _announce(job: Job, problem: Problem, model: nn.Module, contenders: dict[str, Settings]) -> None:
    parameters = sum(parameter.numel() for parameter in model.parameters())
    environment = describe(problem.device)
    _say(
        f"{problem.name}: {problem.dim} dimensions, {type(model).__name__} with {parameters} parameters, "
        f"seed {job.seed}, {environment['device']} ({environment['threads']} threads), torch {environment['torch']}"
    )
    swept = [name for name, settings in contenders.items() if settings.lr is None]
    line = f"{job.budget_seconds:g} s of training each for {', '.join(contenders)}"
    if swept:
        line += f"; {SWEEP_SHARE * job.budget_seconds:g} s for each learning rate tried for {', '.join(swept)}"
    _say(f"{line}; compared by {score_name(problem.score)}")
