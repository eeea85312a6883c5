import pytest
import torch
from torch import Tensor, nn

from experiments.problems.poisson import Collocation, Inside, Poisson, residual, solution, source, unit_square
from hessfree import CG, Armijo, HessianFree, Identity
from hessfree.recording.trace import collect_marks


@pytest.fixture(scope="module")
def problem() -> Poisson:
    return Poisson.of(torch.device("cpu"))


class Exact(nn.Module):
    def forward(self, points: Tensor) -> Tensor:
        return solution(points)


def test_points(problem: Poisson) -> None:
    inside, boundary = problem.points.inside.points, problem.points.boundary
    assert inside.shape == (1024, 2) and boundary.shape == (256, 2) and problem.rows == 1280
    assert ((inside > 0) & (inside < 1)).all()
    on_side = torch.stack([boundary[:, 0] == 0, boundary[:, 0] == 1, boundary[:, 1] == 0, boundary[:, 1] == 1])
    assert on_side.sum(1).tolist() == [64] * 4 and on_side.any(0).all()
    assert (boundary[:, 0] * (1 - boundary[:, 0])).unique().numel() > 120
    assert solution(boundary.double()).abs().max() < 1e-6


def test_the_exact_solution_has_no_loss(problem: Poisson) -> None:
    points = unit_square(50, 20, torch.Generator().manual_seed(0))
    points = Collocation(
        Inside(points.inside.points.double(), source(points.inside.points.double())), points.boundary.double()
    )
    assert residual(Exact(), points.inside).abs().max() < 1e-12 * points.inside.source.abs().max()
    assert points.inside.source.abs().max() > 20
    assert problem.loss(Exact(), points) < 1e-12
    judged = problem.evaluate(Exact())
    assert judged["relative_error"] == 0 and judged["train_objective"] < 1e-6


def test_residual_by_finite_differences(problem: Poisson) -> None:
    model = problem.initial_model(0).double()
    inside = Inside(torch.rand(6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), torch.ones(6, 1))
    h = 1e-4
    steps = torch.tensor([[h, 0.0], [-h, 0.0], [0.0, h], [0.0, -h]], dtype=torch.float64)
    around = sum(model(inside.points + step) for step in steps)
    laplacian = (around - 4 * model(inside.points)) / h**2
    torch.testing.assert_close(residual(model, inside), -laplacian - 1, rtol=0, atol=1e-5)


def test_boundary_is_weighed() -> None:
    class One(nn.Module):
        def forward(self, points: Tensor) -> Tensor:
            return 1 + 0 * points[:, :1] ** 3

    points = Collocation(Inside(torch.rand(3, 2), torch.tensor([[1.0], [2.0], [4.0]])), torch.zeros(2, 2))
    assert Poisson(points, torch.device("cpu")).loss(One(), points).item() == pytest.approx(21 / 3 + 100)


def test_draws_are_proportional(problem: Poisson) -> None:
    assert problem.stream(0).draw(1280) is problem.points and problem.stream(1).draw(9999) is problem.points
    for n, expected in ((640, (512, 128)), (5, (4, 1)), (2, (1, 1)), (1279, (1024, 255))):
        batch = problem.stream(0).draw(n)
        assert (len(batch.inside), len(batch.boundary)) == expected
        torch.testing.assert_close(batch.inside.source, source(batch.inside.points))
    with pytest.raises(ValueError, match="n=1 has no room"):
        problem.stream(0).draw(1)


def test_outputs_are_marked_and_nothing_else_changes(problem: Poisson) -> None:
    model, batch = problem.initial_model(0), problem.stream(0).draw(100)
    with collect_marks() as marks:
        marked = problem.loss(model, batch)
    assert len(marks) == 2
    with torch.no_grad():
        assert problem.loss(model, batch).item() == marked.item()


def test_gauss_newton_steps_lower_the_objective(problem: Poisson) -> None:
    model, batch = problem.initial_model(0), problem.stream(0).draw(160)
    # Without K-FAC, which declines a network that is differentiated in its input, and warns of it.
    optimizer = HessianFree(
        model.parameters(), solver=CG(max_iterations=10), preconditioner=Identity(), line_search=Armijo()
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = problem.loss(model, batch)
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(6)]
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.9 * losses[0]
