import pytest
import torch

from experiments.environment import UsageError
from experiments.problems import PROBLEMS, Problem, make

# One of each kind: two-dimensional data cost little, 784 dimensions seconds.
KINDS = (
    "8gaussians",
    "digits",
    "moons-stable",
    "checkerboard-fixed",
    "autoencoder",
    "poisson",
    "conv",
    "8gaussians-ot",
)


@pytest.fixture(scope="module", params=KINDS)
def problem(request: pytest.FixtureRequest) -> Problem:
    return make(request.param, "cpu")


def test_a_step_downhill(problem: Problem) -> None:
    assert problem.device == torch.device("cpu") and problem.dim >= 2
    assert problem.outputs >= 1 and problem.first_loss > 0
    model = problem.initial_model(0)
    batch = problem.stream(0).draw(64)
    loss = problem.loss(model, batch)
    assert loss.shape == () and loss.isfinite()
    gradient = torch.autograd.grad(loss, list(model.parameters()))
    assert all(g.isfinite().all() for g in gradient)
    squared = sum(g.square().sum() for g in gradient)
    with torch.no_grad():
        for parameter, g in zip(model.parameters(), gradient, strict=True):
            parameter -= 1e-4 * g / squared.sqrt()
    expected = loss - 1e-4 * squared.sqrt()
    assert problem.loss(model, batch) < loss
    torch.testing.assert_close(problem.loss(model, batch) - loss, expected - loss, rtol=0.2, atol=1e-6 * loss.item())


def test_judged_by_the_same_rows_every_time(problem: Problem) -> None:
    model = problem.initial_model(0)
    first, second = problem.evaluate(model), make(problem.name).evaluate(model)
    assert first == second and problem.score in first
    assert all(isinstance(value, float) and value == value for value in first.values())
    assert problem.evaluate(problem.initial_model(1))[problem.score] != first[problem.score]
    assert not any(parameter.grad is not None for parameter in model.parameters())


def test_seeds_fix_everything(problem: Problem) -> None:
    state = torch.get_rng_state()

    def numbers(seed: int) -> list[torch.Tensor]:
        model = problem.initial_model(seed)
        losses = [problem.loss(model, problem.stream(seed).draw(n)).detach() for n in (5, 40)]
        return [*(parameter.detach() for parameter in model.parameters()), *losses]

    first, second, other = (numbers(seed) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first[-2:], other[-2:], strict=True))
    assert torch.equal(torch.get_rng_state(), state)


def test_names() -> None:
    assert set(KINDS) <= set(PROBLEMS) and len(PROBLEMS) == len(set(PROBLEMS))
    assert all(make(name).name == name for name in KINDS)


def test_unknown_name() -> None:
    with pytest.raises(UsageError, match="'spirals' is unknown.*8gaussians"):
        make("spirals")
