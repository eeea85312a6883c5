"""Runs in fresh processes, so that imports, first-step tracing and threads are the same for all."""

import dataclasses
import functools
import math
import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from experiments.benchmark import floor
from experiments.benchmark.pace import Pace
from experiments.comparison import load_torch_optimizers
from experiments.environment import choose_device
from experiments.optimizers import Settings
from experiments.problems import Problem, make
from experiments.training import Task, Training

Row = dict[str, Any]  # one run, as results.json has it

_POINTS = 60  # evaluations a run, 8 % apart in time but early on, where a step or a stair of `Pace` covers several
_FIRST_POINT = 0.01  # of the budget


@dataclass(frozen=True, kw_only=True)
class Work:
    """One run that is to be made. It can be pickled.

    Attributes:
        problem: A name of `experiments.problems.PROBLEMS`.
        optimizer: What to call the optimizer.
        settings: Its settings.
        seed: Fixes initial weights and data.
        budget_seconds: Seconds of training.
        threads: Of torch, within an operation.
        device: Where the training runs.
        data_root: Where the files of data sets are; None: the usual place.
        pace: The course of an earlier run, which is repeated; None: the clock decides. See `Pace`.
        floor: Whether the statistical floor is measured at the end, where there is one.
    """

    problem: str
    optimizer: str
    settings: Settings
    seed: int
    budget_seconds: float
    threads: int
    device: str = "cpu"
    data_root: Path | None = None
    pace: tuple[int, ...] | None = None
    floor: bool = False


def perform(work: Work) -> Row:
    """Make a run in this process.

    On the clock are the building of the optimizer, rows, and steps, the first one with its tracing included. Off the
    clock are imports: an optimizer should not pay for the other optimizers that its package holds.

    Args:
        work: The run.

    Returns:
        The row of results.json. Scores that are not finite are None; so is the final score of a run that ended in a
        matrix without a factorisation, which is divergence too.
    """
    torch.set_num_threads(work.threads)
    problem = _problem(work.problem, work.device, work.data_root)
    load_torch_optimizers()
    work.settings.build(problem.initial_model(work.seed).parameters(), work.seed)
    budget = work.budget_seconds
    moments = [budget * _FIRST_POINT ** (1 - index / (_POINTS - 1)) for index in range(_POINTS)]
    row: Row = {
        "problem": work.problem,
        "optimizer": work.optimizer,
        "seed": work.seed,
        "budget_seconds": budget,
        "score": problem.score,
        "settings": recorded(work.settings),
    }
    pace = Pace(budget, work.pace)
    try:
        task = Task(problem, work.optimizer, work.settings, seed=work.seed, budget=pace, moments=moments)
        training = Training(task)
        training.record()
        while not training.done:
            training.step()
    except torch.linalg.LinAlgError as error:
        nothing: Row = {"seconds": None, "final": None, "losses": {}, "steps": None, "samples": None}
        return row | nothing | {"error": str(error), "curve": {"seconds": [], "score": [], "samples": []}}
    points = training.points
    final = points[-1]
    row |= {
        "seconds": final.seconds,
        "final": _finite(final.losses[problem.score]),
        "losses": {name: _finite(value) for name, value in final.losses.items()},
        "steps": final.step,
        "samples": final.samples,
        "curve": {
            "seconds": [point.seconds for point in points],
            "score": [_finite(point.losses[problem.score]) for point in points],
            "samples": [point.samples for point in points],
        },
        "pace": " ".join(map(str, pace.reached)),  # from which the run can be repeated step by step
    }
    if work.floor and row["final"] is not None and floor.has_floor(problem):
        measured = floor.floor_of(problem, training.model, work.seed)
        row["floor"] = floor.recorded(measured, row["curve"]["samples"])
    return row


@functools.lru_cache(maxsize=1)
def _problem(name: str, device: str, data_root: Path | None) -> Problem:
    """Make a problem once where its runs follow each other in one process."""
    return make(name, choose_device(device), data_root)


def perform_all(works: Sequence[Work], jobs: int = 1, *, alone: bool = True) -> Iterator[Row]:
    """Make runs, each in a process of its own.

    Args:
        works: The runs.
        jobs: How many at a time; 0: one after the other in this process, which no timing should be taken from.
        alone: False: one after the other in one process, which imports once: for a run that only shows that all works.

    Yields:
        The rows, in the order of `works`, each as soon as it and those before it are there.
    """
    if jobs == 0:
        yield from map(perform, works)
    elif not alone:
        with _process() as process:
            yield from process.map(perform, works)
    else:
        with ThreadPoolExecutor(jobs) as waiting:
            yield from waiting.map(_perform_alone, works)


def _perform_alone(work: Work) -> Row:
    with _process() as process:
        return process.submit(perform, work).result()


def _process() -> ProcessPoolExecutor:
    # A new interpreter rather than a fork: torch's threads do not survive one, and imports start from nothing.
    return ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))


def recorded(settings: Settings) -> dict[str, Any]:
    """Give settings as JSON can hold them.

    Args:
        settings: A dataclass.

    Returns:
        Values by name; what is no number is written out, and what the settings do not show is left out.
    """
    values = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings) if field.repr}
    return {name: value if isinstance(value, int | float | None) else repr(value) for name, value in values.items()}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
