import pytest
import torch

from experiments import data
from experiments.problems import Noisy, make
from experiments.problems.flow import FixedFlowMatching, FlowMatching, StableFlowMatching

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["8gaussians", "checkerboard"])
def test_fixed_rows_hold_the_exact_velocity(name: str) -> None:
    dataset = data.load(name)
    problem = FixedFlowMatching.of(dataset, CPU)
    assert problem.rows == 4096 and problem.name == f"{name}-fixed"
    batch = problem.stream(0).draw(4096)
    for seed in (0, 1):
        assert problem.stream(seed).draw(8192) is batch
    assert torch.equal(batch.u, dataset.conditional_expectation(batch.x_t, batch.t))
    assert batch.u.dtype == torch.float32
    judged = problem.evaluate(dataset.conditional_expectation)  # type: ignore[arg-type]
    assert judged == {"fixed_excess": 0.0, "excess_loss": 0.0}
    assert not isinstance(problem, Noisy)


def test_fixed_score_is_the_loss_on_all_rows() -> None:
    problem = FixedFlowMatching.of(data.load("moons"), CPU)
    model = problem.initial_model(0)
    assert problem.evaluate(model)[problem.score] == pytest.approx(
        problem.loss(model, problem.stream(0).draw(4096)).item()
    )


def test_stable_differs_from_raw_in_the_target_alone() -> None:
    dataset = data.load("8gaussians")
    raw, stable = FlowMatching.of(dataset, CPU), StableFlowMatching.of(dataset, CPU)
    first, second = raw.stream(3).draw(512), stable.stream(3).draw(512)
    assert torch.equal(first.x_t, second.x_t) and torch.equal(first.t, second.t)
    assert not torch.equal(first.u, second.u)
    model = raw.initial_model(0)
    assert raw.evaluate(model) == stable.evaluate(model)
    assert stable.name == "8gaussians-stable" and stable.rows is None and stable.score == "excess_loss"


def test_noise_floors() -> None:
    raw, stable = make("8gaussians"), make("8gaussians-stable")
    assert isinstance(raw, Noisy) and isinstance(stable, Noisy)
    assert raw.noise_floor == pytest.approx(4.93, rel=0.05)
    assert stable.noise_floor == pytest.approx(0.18, rel=0.15)
    assert stable.noise_floor == make("8gaussians-stable").noise_floor  # type: ignore[attr-defined]
