import pytest
import torch
from torch import Tensor

from experiments.benchmark.floor import Floor, Spectrum, floor_of, has_floor, recorded, spectrum
from experiments.problems import make
from hessfree import GaussNewton

DOUBLE = torch.zeros((), dtype=torch.float64)


def matrix(size: int, decay: float = 0.7) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q
    return basis @ torch.diag(decay ** torch.arange(size, dtype=torch.float64)) @ basis.T


def test_effective_dimensions_by_quadrature() -> None:
    G = matrix(60)
    exact = [torch.trace(G @ torch.linalg.inv(G + x * torch.eye(60))).item() for x in (1e-4, 1e-2, 1.0)]
    found = spectrum(lambda v: G @ v, 60, steps=25, probes=100, like=DOUBLE)
    assert found.weights.sum().item() == pytest.approx(60)
    assert [found.effective_dimension(x) for x in (1e-4, 1e-2, 1.0)] == pytest.approx(exact, rel=0.05)


def test_a_matrix_of_low_rank_ends_lanczos_early() -> None:
    products = 0

    def matvec(v: Tensor) -> Tensor:
        nonlocal products
        products += 1
        return torch.cat([3 * v[:4], torch.zeros(16, dtype=v.dtype)])

    found = spectrum(matvec, 20, steps=15, probes=2, like=DOUBLE)
    assert products <= 6 and found.effective_dimension(3.0) == pytest.approx(2.0)


def test_no_ridge_regression_goes_below_it() -> None:
    """Linear regression with a normal prior: the floor is what the best ridge attains, by simulation."""
    size, rows, outputs, sigma, tau = 6, 30, 2, 0.8, 0.5
    generator = torch.Generator().manual_seed(1)
    J = torch.randn(rows * outputs, size, generator=generator, dtype=torch.float64) @ matrix(size)
    G = 2 / (rows * outputs) * J.T @ J
    values = torch.linalg.eigvalsh(G)
    floor = Floor(sigma**2, outputs, size, size * tau**2, Spectrum(values, torch.ones_like(values)))

    def excess(penalty: float) -> float:
        truth = tau * torch.randn(size, 20_000, generator=generator, dtype=torch.float64)
        noise = sigma * torch.randn(rows * outputs, 20_000, generator=generator, dtype=torch.float64)
        ridge = J.T @ J + penalty * torch.eye(size)
        errors = J @ (torch.linalg.solve(ridge, J.T @ (J @ truth + noise)) - truth)
        return errors.square().mean().item()

    best = sigma**2 / tau**2
    assert excess(best) == pytest.approx(floor.excess(rows), rel=0.02)
    assert all(excess(best * factor) > 1.01 * floor.excess(rows) for factor in (0.1, 10.0))
    assert excess(1e-9) == pytest.approx(floor.without_prior(rows), rel=0.02)
    assert floor.excess(10**9) == pytest.approx(floor.without_prior(10**9), rel=1e-3)


def test_the_floor_of_a_problem() -> None:
    problem = make("8gaussians")
    assert has_floor(problem)
    assert not any(
        has_floor(make(name)) for name in ("8gaussians-fixed", "8gaussians-stable", "8gaussians-ot", "digits")
    )
    model = problem.initial_model(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01
    floor = floor_of(problem, model, 0, rows=256, steps=20)
    assert floor.parameters == 8706 and floor.variance == pytest.approx(4.93, rel=0.05)
    assert floor.distance == pytest.approx(8706 * 1e-4, rel=1e-4)
    # the trace of G by the quadrature is that by the same signs
    batch = problem.stream(777).draw(256)
    curvature = GaussNewton.from_loss(model, lambda z, u: (z - u).square().mean(), (batch.x_t, batch.t), batch.u)
    generator = torch.Generator().manual_seed(777)
    signs = [(2 * torch.randint(0, 2, (8706,), generator=generator) - 1).float() for _ in range(4)]
    expected = sum((s @ curvature.matvec(s)).item() for s in signs) / 4
    assert (floor.spectrum.weights * floor.spectrum.values).sum().item() == pytest.approx(expected, rel=1e-3)
    written = recorded(floor, [0, 100, 1000])
    assert written["samples"] == [100, 1000] and written["excess"][0] > written["excess"][1]
    assert all(a < b for a, b in zip(written["excess"], written["without_prior"], strict=True))
