"""The excess that no way of using N noisy rows can be expected to go below, near a trained network.

Near weights θ the network is linear in its parameters, and fitting N rows whose targets have noise of variance σ² (a
component) is a linear regression. Take the start θ₀ as all that is known beforehand, and the weights sought as P
independent normal steps τ away from it, τ² = |θ - θ₀|²/P: then ridge regression with

    λ = 2σ²/(N·D·τ²)        has the least expected excess of all estimators,     d_eff(λ)·σ²/(D·N),

with d_eff(λ) = tr(G (G + λI)⁻¹), G the Gauss-Newton matrix of the mean over rows and D components (Hastie, Tibshirani &
Friedman 2009, sec. 3.4.1 and 7.6; Dobriban & Wager 2018, arXiv 1507.03003). The penalty is thus not chosen but follows
from the noise, the rows and how far training moved; as N grows d_eff rises to the rank of G, and the bound to that of
least squares without a prior, P·σ²/(D·N), beyond which averaging cannot help. What a network that moves its features
does can differ: the floor is that of the linearised problem.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from experiments.problems import Noisy, Problem
from experiments.problems.flow import StableFlowMatching

_SEED = 777  # of the rows of G and of the probes
_ROWS = 8192
_LANCZOS_STEPS = 80
_PROBES = 4


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues with weights, such that sum(weights · f(values)) estimates tr f(G).

    Attributes:
        values: Not negative.
        weights: Positive; their sum is P.
    """

    values: Tensor
    weights: Tensor

    def effective_dimension(self, damping: float) -> float:
        """Estimate tr(G (G + λI)⁻¹).

        Args:
            damping: λ, positive.

        Returns:
            The number of parameters that count.
        """
        return (self.weights * self.values / (self.values + damping)).sum().item()


def spectrum(
    matvec: Callable[[Tensor], Tensor], size: int, *, steps: int, probes: int, like: Tensor, seed: int = _SEED
) -> Spectrum:
    """Estimate a spectrum by stochastic Lanczos quadrature (Ubaru, Chen & Saad 2017).

    Args:
        matvec: Multiplies by a symmetric matrix that is positive semidefinite.
        size: P.
        steps: Of Lanczos from each probe, with full reorthogonalisation: at most so many products.
        probes: Vectors of random signs.
        like: Gives the dtype and device of the vectors.
        seed: Of the signs.

    Returns:
        The spectrum; its mean over the signs is exact in every power of G below 2·`steps`.
    """
    generator = torch.Generator().manual_seed(seed)
    values, weights = [], []
    for _ in range(probes):
        signs = 2 * torch.randint(0, 2, (size,), generator=generator) - 1
        eigenvalues, vectors = torch.linalg.eigh(_tridiagonal(matvec, signs.to(like) / math.sqrt(size), steps))
        values.append(eigenvalues.clamp(min=0))
        weights.append(size / probes * vectors[0].square())
    return Spectrum(torch.cat(values), torch.cat(weights))


def _tridiagonal(matvec: Callable[[Tensor], Tensor], start: Tensor, steps: int) -> Tensor:
    """Lanczos's matrix, float64 on the CPU."""
    basis = [start]
    diagonal: list[float] = []
    beside: list[float] = []
    for step in range(min(steps, len(start))):
        image = matvec(basis[-1])
        diagonal.append(torch.dot(image, basis[-1]).item())
        known = torch.stack(basis)
        for _ in range(2):  # once leaves what rounding put back
            image = image - known.T @ (known @ image)
        norm = torch.linalg.vector_norm(image).item()
        if step + 1 == min(steps, len(start)) or norm <= 1e-6 * max(map(abs, diagonal)):
            break
        beside.append(norm)
        basis.append(image / norm)
    off = torch.tensor(beside, dtype=torch.float64)
    return torch.diag(torch.tensor(diagonal, dtype=torch.float64)) + torch.diag(off, 1) + torch.diag(off, -1)


@dataclass(frozen=True)
class Floor:
    """The floor of a problem near some weights.

    Attributes:
        variance: σ² of the target's noise, a component.
        outputs: D.
        parameters: P.
        distance: |θ - θ₀|².
        spectrum: Of G at θ.
    """

    variance: float
    outputs: int
    parameters: int
    distance: float
    spectrum: Spectrum

    def effective_dimension(self, samples: float) -> float:
        """Give d_eff at the λ of so many rows.

        Args:
            samples: N.

        Returns:
            Up to P.
        """
        prior = self.distance / self.parameters
        return self.spectrum.effective_dimension(2 * self.variance / (samples * self.outputs * prior))

    def excess(self, samples: float) -> float:
        """Give the least expected excess after so many rows.

        Args:
            samples: N.

        Returns:
            Mean square a component.
        """
        return self.effective_dimension(samples) * self.variance / (self.outputs * samples)

    def without_prior(self, samples: float) -> float:
        """Give the excess of plain least squares, P·σ²/(D·N): what averaging alone comes to.

        Args:
            samples: N.

        Returns:
            Mean square a component.
        """
        return self.parameters * self.variance / (self.outputs * samples)


def has_floor(problem: Problem) -> bool:
    """Tell whether a problem's score is an excess over noise of a known variance, on rows that never end.

    Args:
        problem: The problem.

    Returns:
        Whether `floor_of` takes it. Where fixed rows carry no noise there is no such floor; where the score is a loss
        on held-out rows its own floor is not known; where targets are averaged over a block of rows their noise is
        not independent from row to row, as the formula has it.
    """
    noisy = isinstance(problem, Noisy) and not isinstance(problem, StableFlowMatching)
    return problem.rows is None and problem.score == "excess_loss" and noisy


def floor_of(problem: Any, model: nn.Module, seed: int, rows: int = _ROWS, steps: int = _LANCZOS_STEPS) -> Floor:
    """Measure the floor near a trained network.

    Args:
        problem: One that `has_floor`, of flow matching.
        model: The network.
        seed: Whose initial weights it started from.
        rows: On which G is taken: N·D of them span it.
        steps: Products with G from each of four probes.

    Returns:
        The floor.
    """
    from torch.nn import functional as F

    from hessfree import GaussNewton

    batch = problem.stream(_SEED).draw(rows)
    curvature = GaussNewton.from_loss(model, F.mse_loss, (batch.x_t, batch.t), batch.u)
    start = problem.initial_model(seed).parameters()
    moved = sum(((now - then) ** 2).sum().item() for now, then in zip(model.parameters(), start, strict=True))
    like = next(model.parameters()).detach()
    found = spectrum(curvature.matvec, curvature.size, steps=steps, probes=_PROBES, like=like)
    return Floor(problem.noise_floor, problem.outputs, curvature.size, moved, found)


def recorded(floor: Floor, samples: Sequence[int]) -> dict[str, Any]:
    """Give the floor as results.json holds it.

    Args:
        floor: The floor.
        samples: The N of a run's points.

    Returns:
        Numbers by name; lists of equal length, N = 0 left out.
    """
    counted = [n for n in samples if n > 0]
    return {
        "variance": floor.variance,
        "parameters": floor.parameters,
        "samples": counted,
        "effective_dimension": [floor.effective_dimension(n) for n in counted],
        "excess": [floor.excess(n) for n in counted],
        "without_prior": [floor.without_prior(n) for n in counted],
    }
