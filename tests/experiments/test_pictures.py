from pathlib import Path
from typing import Any

import pytest
import torch

from experiments import data
from experiments.paths import Paths
from experiments.pictures import View, snapshot, write_samples
from experiments.problems.flow import make_flow
from experiments.sampling import Sampler

SIGNATURE = b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize(
    ("name", "coupling"), [("8gaussians", "independent"), ("moons", "ot"), ("digits", "independent")]
)
def test_samples(name: str, coupling: Any, tmp_path: Path) -> None:
    problem = make_flow("raw", data.load(name), torch.device("cpu"), paths=Paths(coupling=coupling))
    view = View.of(problem)
    good = problem.initial_model(0)
    fields = [("hessfree", good), ("diverged", lambda x, t: x * torch.nan), ("adam", lambda x, t: 1e30 * x**3)]
    path = write_samples(tmp_path / "samples.png", view, fields, Sampler(steps=2), ["a", "b", "c"])
    assert path.read_bytes().startswith(SIGNATURE) and path.stat().st_size > 20_000
    images = snapshot(view, "adam")(good)
    assert set(images) == {"samples/points", "samples/field"}
    for image in images.values():
        assert image.dtype == torch.uint8 and image.shape[2] == 3 and len(image.unique()) > 10
    assert torch.equal(View.of(problem).points, view.points) and torch.equal(View.of(problem).noise, view.noise)


def test_the_exact_field_is_that_of_the_paths() -> None:
    problem = make_flow("raw", data.load("8gaussians"), torch.device("cpu"), paths=Paths(sigma=0.5))
    exact = View.of(problem).exact()
    assert exact is not None
    x, t = torch.randn(4, 2), torch.tensor(0.5)
    assert torch.equal(exact(x, t), problem.dataset.conditional_expectation(x, t, 0.5))
