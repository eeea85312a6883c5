import math

import pytest
import torch

from experiments import data
from experiments.environment import UsageError
from experiments.flow_matching import BatchStream, Evaluation, loss, sample_batch
from experiments.models import ToyMLP
from experiments.optimal_transport import pair
from experiments.paths import OT_BLOCK, Paths
from experiments.posteriors import squares_velocity
from experiments.problems.flow import FlowMatching, StableFlowMatching

CPU = torch.device("cpu")
NAMES = ("8gaussians", "moons", "checkerboard")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_noise_about_the_line() -> None:
    dataset = data.load("moons")
    straight = sample_batch(dataset, 5000, generator())
    noisy = sample_batch(dataset, 5000, generator(), paths=Paths(sigma=0.3))
    assert torch.equal(straight.t, noisy.t) and torch.equal(straight.u, noisy.u)
    strayed = noisy.x_t - straight.x_t
    assert strayed.std().item() == pytest.approx(0.3, rel=0.03)
    assert strayed.mean().item() == pytest.approx(0, abs=0.01)


def test_logit_normal_times() -> None:
    t = sample_batch(data.load("moons"), 20_000, generator(), paths=Paths(times="logit-normal")).t
    normal = torch.special.logit(t.double())
    assert normal.mean().abs() < 0.03 and normal.std().item() == pytest.approx(1, rel=0.03)


def test_optimal_transport_pairs_within_blocks() -> None:
    dataset, n = data.load("8gaussians"), 2 * OT_BLOCK + 50
    paired = sample_batch(dataset, n, generator(), paths=Paths(coupling="ot"))
    plain = sample_batch(dataset, n, generator())
    x0, x1 = plain.x_t - plain.t * plain.u, plain.x_t + (1 - plain.t) * plain.u
    assert torch.equal(paired.t, plain.t)
    for start in range(0, n, OT_BLOCK):
        rows = slice(start, start + OT_BLOCK)
        expected = x1[rows][pair(x0[rows], x1[rows])] - x0[rows]
        torch.testing.assert_close(paired.u[rows], expected, atol=1e-4, rtol=0)
    assert paired.u.square().mean() < 0.7 * plain.u.square().mean()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sigma", [0.3, 1.0])
def test_closed_forms_with_noise(name: str, sigma: float) -> None:
    """E[(u - E[u | x_t, t]) f(x_t, t)] = 0 for every f: the expectation is a regression on all functions."""
    dataset, paths = data.load(name), Paths(sigma=sigma)
    rows = sample_batch(dataset, 20_000, generator(1), paths=paths)
    exact = dataset.conditional_expectation(rows.x_t, rows.t, sigma)
    wrong = dataset.conditional_expectation(rows.x_t, rows.t)
    apart = (exact - wrong) * ((rows.t > 0.5) & (rows.t < 0.9))
    for f in (rows.t, rows.x_t, rows.x_t * rows.t, rows.x_t.sin(), exact, rows.x_t * (rows.t > 0.9), apart):
        products = ((rows.u - exact).double() * f).sum(1)
        assert products.mean().abs() < 4.5 * products.std() / len(products) ** 0.5
    # the last function is the sharpest: the formula without the noise fails there
    products = ((rows.u - wrong).double() * apart).sum(1)
    assert products.mean().abs() > 6 * products.std() / len(products) ** 0.5


@pytest.mark.parametrize("sigma", [0.0, 0.2, 1.0])
def test_the_two_forms_for_squares_meet(sigma: float) -> None:
    x = torch.linspace(-5, 5, 41, dtype=torch.float64)[:, None].expand(-1, 2)
    corners = data.checkerboard().corners
    before, after = (squares_velocity(x, torch.tensor(t), corners, 2.0, sigma) for t in (0.5 - 1e-9, 0.5))
    torch.testing.assert_close(before, after, rtol=1e-7, atol=1e-7)


def test_judged_at_uniform_times_and_along_the_paths() -> None:
    dataset = data.load("8gaussians")
    usual, skewed = (Evaluation.of(dataset, n=500, paths=Paths(times=t)) for t in ("uniform", "logit-normal"))  # type: ignore[arg-type]
    assert torch.equal(usual.points.x_t, skewed.points.x_t)
    noisy = Evaluation.of(dataset, n=500, paths=Paths(sigma=0.5))
    assert noisy.excess_loss(lambda x, t: dataset.conditional_expectation(x, t, 0.5)) == 0
    assert noisy.noise_floor > usual.noise_floor


@pytest.mark.parametrize("times", ["uniform", "logit-normal"])
def test_the_floor_is_that_of_the_training(times: str) -> None:
    problem = FlowMatching.of(data.load("8gaussians"), CPU, paths=Paths(times=times, sigma=0.1))  # type: ignore[arg-type]
    rows = problem.stream(3).draw(40_000)
    exact = problem.dataset.conditional_expectation(rows.x_t, rows.t, 0.1)
    assert (rows.u - exact).square().mean().item() == pytest.approx(problem.noise_floor, rel=0.03)


def test_without_a_closed_form_held_out_rows_judge() -> None:
    problem = FlowMatching.of(data.load("moons"), CPU, paths=Paths(coupling="ot"))
    assert problem.score == "holdout_loss" and problem.name == "moons-ot"
    model = problem.initial_model(0)
    assert set(problem.evaluate(model)) == {"holdout_loss"}
    assert math.isnan(problem.noise_floor) and math.isnan(problem.evaluation.excess_loss(model))
    held_out = problem.evaluation.held_out
    assert problem.evaluate(model)["holdout_loss"] == loss(model, held_out).item()


def test_a_stream_of_other_paths_does_not_depend_on_how_it_is_cut() -> None:
    paths = Paths(sigma=0.1, times="logit-normal")
    whole = BatchStream(data.load("moons"), 5, paths=paths).draw(9000)
    stream = BatchStream(data.load("moons"), 5, paths=paths)
    assert torch.equal(torch.cat([stream.draw(n).x_t for n in (100, 8200, 700)]), whole.x_t)


def test_names_and_widths() -> None:
    paths = Paths(sigma=0.1, coupling="ot", times="logit-normal")
    problem = FlowMatching.of(data.load("moons"), CPU, paths=paths, width=8, n_hidden=2)
    assert problem.name == "moons-w8-l2-ot-sigma0.1-logit-normal"
    model, expected = problem.initial_model(0), ToyMLP(2, w=8, n_hidden=2, time_varying=True)
    assert [p.shape for p in model.parameters()] == [p.shape for p in expected.parameters()]


@pytest.mark.parametrize("changes", [{"sigma": -1.0}, {"sigma": math.nan}, {"coupling": "shy"}, {"times": "late"}])
def test_paths_that_make_no_sense(changes: dict[str, object]) -> None:
    with pytest.raises(UsageError, match=r"--(sigma|coupling|times) .*(give|choose)"):
        Paths(**changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("changes", [{"sigma": 0.1}, {"coupling": "ot"}])
def test_where_the_stable_target_is_biased_it_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="--target raw"):
        StableFlowMatching.of(data.load("moons"), CPU, paths=Paths(**changes))  # type: ignore[arg-type]
