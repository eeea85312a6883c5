"""The end of the main job: tables, results.json, curves and samples, from the runs and their networks."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from experiments.flow_matching import Field
from experiments.pictures import View, write_samples
from experiments.plots import write_curves
from experiments.problems.flow import Flow
from experiments.records import Run
from experiments.results import quality_table, table, write_json
from experiments.sample_metrics import Quality
from experiments.sampling import Sampler

FILES = ("results.json", "curves.png", "samples.png")
_SAMPLES_2D = 4096
_SAMPLES = 1024  # where distances are dearer
_SEED = 4242  # of the noise and the data that samples are compared with
_DATA = "data, drawn again"


def write_outcome(
    out: Path,
    problem: Flow,
    runs: Sequence[Run],
    *,
    view: View,
    sampler: Sampler,
    loop: str,
    say: Callable[[str], None],
) -> None:
    """Draw samples of every network, print the tables and write the files.

    Args:
        out: Where the files go.
        problem: What was solved.
        runs: One an optimizer.
        view: How data are shown.
        sampler: Draws the samples.
        loop: What called the optimizers.
        say: Prints a line.
    """
    fields = [(run.optimizer, trained(problem, run)) for run in runs]
    qualities = measure_samples(problem, fields, sampler)
    captions = [f"energy distance {qualities[name].energy_distance:.3f}" for name, _ in fields]
    results, curves, samples = FILES
    paths = [
        write_json(out / results, problem, runs, qualities, loop),
        write_curves(out / curves, problem, runs),
        write_samples(out / samples, view, fields, sampler, captions),
    ]
    n = _SAMPLES_2D if problem.dim == 2 else _SAMPLES
    say(f"\n{table(problem, runs, loop)}\n\n{quality_table(qualities, f'{n} by {sampler}')}\n")
    for path in paths:
        say(f"wrote {path}")


def trained(problem: Flow, run: Run) -> Field:
    """Give the velocity field that a run ended with.

    Args:
        problem: What was solved.
        run: The run, with its weights.

    Returns:
        The network.
    """
    model = problem.initial_model(run.seed)
    model.load_state_dict(run.weights)
    return model.eval()


def measure_samples(problem: Flow, fields: Sequence[tuple[str, Field]], sampler: Sampler) -> dict[str, Quality]:
    """Measure how far samples are from held-out data.

    Args:
        problem: Holds the data.
        fields: Names and velocity fields; all start from the same noise.
        sampler: Draws the samples.

    Returns:
        Distances by name; last those of another draw of the data, which no sampler can be expected to go below.
    """
    n = _SAMPLES_2D if problem.dim == 2 else _SAMPLES
    generator = torch.Generator().manual_seed(_SEED)
    held_out = problem.dataset.holdout(n, generator)
    again = problem.dataset.holdout(n, generator)
    noise = torch.randn(n, problem.dim, generator=generator).to(problem.device)

    def quality(points: Tensor) -> Quality:
        return Quality.of(points, held_out)

    qualities = {name: quality(sampler.carry(field, noise)) for name, field in fields}
    return qualities | {_DATA: quality(again)}
