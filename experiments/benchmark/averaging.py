"""The statistical floor against Adam's own averaged iterate: is what the figures draw where averaging comes to?

Steps of constant length wander about a minimum, and the mean of the weights over many of them does not (Polyak &
Juditsky 1992): with as many rows it comes closest of all simple methods to the least excess.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from experiments.benchmark import floor, suite, tuning
from experiments.environment import UsageError
from experiments.problems import make
from experiments.training import Budget, Task, Training


@dataclass(frozen=True, kw_only=True)
class FloorJob:
    """What the user asks for.

    Attributes:
        problems: Names of streaming problems whose excess is known.
        seeds: Of weights and rows.
        steps: Of Adam, in batches of its tuned size; the second half of them is averaged.
        shares: Of its tuned rate, the constant rates that are tried: the higher, the further the average reaches, and
            the further it is from a linear problem.
        threads: Of torch.
        tuned: Where the settings are; None: the file in the package.
    """

    problems: Sequence[str] = ("8gaussians",)
    seeds: Sequence[int] = (0,)
    steps: int = 3000
    shares: Sequence[float] = (1.0, 0.3, 0.1)
    threads: int = 2
    tuned: Path | None = None


def run(job: FloorJob) -> list[dict[str, float]]:
    """Train, average, and print both beside the floor.

    Args:
        job: What the user asks for.

    Returns:
        For each problem, seed and rate: samples, the excess of the last and of the averaged iterate, both floors.

    Raises:
        UsageError: If a problem has no such floor, or a number makes no sense.
    """
    for option, value, least in (("--steps", job.steps, 2), ("--threads", job.threads, 1)):
        if value < least:
            raise UsageError(f"{option} {value} is too few; give {least} or more")
    problems = [make(name) for name in job.problems]
    for problem in problems:
        if not floor.has_floor(problem):
            raise UsageError(f"--problems {problem.name!r} has no known floor; take a streaming set in two dimensions")
    torch.set_num_threads(job.threads)
    tuned = tuning.load(job.tuned or tuning.TUNED)
    print("| problem | seed | rate | samples | last | averaged | floor | P·σ²/(D·samples) | averaged over floor |")
    print("| --- " * 9 + "|")
    found = []
    for problem in problems:
        settings: Any = tuning.settings_of(suite.REFERENCE, problem, tuned, untuned=True)
        for seed in job.seeds:
            for share in job.shares:
                constant = replace(settings, lr=share * settings.lr, final_length=1.0)
                one = _one(problem, constant, seed, job.steps)
                found.append(one)
                cells = (f"{one[key]:.3g}" for key in ("last", "averaged", "floor", "without_prior"))
                print(
                    f"| {problem.name} | {seed} | {constant.lr:g} | {one['samples']:.0f} | {' | '.join(cells)} | "
                    f"{one['averaged'] / one['floor']:.2f} |",
                    flush=True,
                )
    return found


def _one(problem: Any, settings: Any, seed: int, steps: int) -> dict[str, float]:
    """Train once, and measure the floor at the averaged weights."""
    task = Task(problem, suite.REFERENCE, settings, seed=seed, budget=Budget(steps=steps), moments=())
    training = Training(task)
    training.record()
    average = copy.deepcopy(training.model)
    taken = 0
    while not training.done:
        training.step()
        if training.steps > steps // 2:
            taken += 1
            with torch.no_grad():
                for mean, now in zip(average.parameters(), training.model.parameters(), strict=True):
                    mean.lerp_(now, 1 / taken)
    samples = training.points[-1].samples
    bound = floor.floor_of(problem, average, seed)
    return {
        "samples": float(samples),
        "last": training.points[-1].losses[problem.score],
        "averaged": problem.evaluate(average)[problem.score],
        "floor": bound.excess(samples),
        "without_prior": bound.without_prior(samples),
    }
