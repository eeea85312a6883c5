"""The cheapest of the three forms of one damped step, by a model of their costs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hessfree.operators import SymmetricOperator, Work
from hessfree.solvers.base import Map, Solution, Solver
from hessfree.solvers.cg import CG
from hessfree.solvers.dense import DenseCholesky
from hessfree.solvers.gram import GramCholesky

# A machine to count on: two CPU cores in float32. Only ratios matter, and they are not far from those of others. Fitted
# by hand to the nine perceptrons that the study contraction-order calls FITTED, and never to the machine that runs.
GEMM = 90e9  # floating point operations a second in products of large matrices
LAYERS = 150e9  # in products of a network's layers with a vector's worth of rows, whose cost beside is STREAM
STREAM = 3e9  # numbers a second through element-wise operations in cache
TRAFFIC = 1.5e9  # numbers a second of matrices that leave the cache
FACTOR = 60e9  # floating point operations a second in Cholesky's method
KERNEL = 2.2e-6  # seconds to start one kernel
BACKWARD = 40e-6  # seconds of autograd for one node of a graph
DIRECT = 1.3e-3  # seconds that a direct form takes at least


@dataclasses.dataclass(frozen=True)
class AutoSolver(Solver):
    """Solve by CG, by the dense matrix or by the Gram matrix: whichever should take the least time.

    The three give the same step to rounding (CG to its tolerance). The choice is a function of shapes, dtypes and
    settings: of P, N, C, the widths of the layers and the length of a CG run, for which `cg.max_iterations` stands.
    No clock is asked, so that resumed runs and ranks choose alike. Forms that the matrix does not have (an indefinite
    loss has no Gram form), or that exceed their own limits of size, are left out.

    The preconditioner is CG's; give `Identity()` where CG is not expected to be chosen, or it is kept up for nothing.

    Attributes:
        cg: Products.
        dense: P×P.
        gram: N·C×N·C.
    """

    cg: CG = CG(max_iterations=50)
    dense: DenseCholesky = DenseCholesky()
    gram: GramCholesky = GramCholesky()

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            ValueError: A solver is of another kind.
        """
        for name, kind in (("cg", CG), ("dense", DenseCholesky), ("gram", GramCholesky)):
            if not isinstance(getattr(self, name), kind):
                raise ValueError(f"{name}={getattr(self, name)!r} must be a {kind.__name__}")

    @property
    def uses_preconditioner(self) -> bool:
        """Whether `solve` looks at its preconditioner at all: CG does."""
        return self.cg.uses_preconditioner

    def choose(self, work: Work, dtype: torch.dtype = torch.float32) -> Solver:
        """Return the solver with the least expected time.

        Args:
            work: What the forms take.
            dtype: Of the vectors.

        Returns:
            One of the three.
        """
        expected = self.expected_seconds(work, dtype)
        solvers: dict[str, Solver] = {"cg": self.cg, "dense": self.dense, "gram": self.gram}
        return solvers[min(expected, key=lambda name: expected[name])]

    def expected_seconds(self, work: Work, dtype: torch.dtype = torch.float32) -> dict[str, float]:
        """Return the expected time of each form that can be used, on the machine of the model.

        Args:
            work: What the forms take.
            dtype: Of the vectors.

        Returns:
            By name, "cg" always among them: seconds.
        """
        slower = 2.0 if dtype == torch.float64 else 1.0
        out = {"cg": slower * _by_products(work, max(self.cg.max_iterations, 1))}
        if work.size <= self.dense.max_parameters:
            out["dense"] = slower * _dense(work)
        if work.rooted and 0 < work.rows <= self.gram.max_rows:
            out["gram"] = slower * _gram(work)
        return out

    def solve(
        self,
        operator: SymmetricOperator,
        rhs: Tensor,
        shift: float | Tensor,
        precondition: Map | None = None,
        start: Tensor | None = None,
        memory: Mapping[str, Any] | None = None,
    ) -> Solution:
        """Solve (A + diag(shift)) x = rhs in the cheapest form (see `Solver.solve`).

        Args:
            operator: A, `[P, P]`.
            rhs: b, `[P]`.
            shift: The diagonal of D: a number, or `[P]`.
            precondition: For CG.
            start: For CG.
            memory: `Solution.memory` of the last call; None or empty at first.

        Returns:
            The solution.
        """
        chosen = self.choose(operator.work(), operator.dtype)
        name = type(chosen).__name__
        known = (memory or {}).get("of", {}) if (memory or {}).get("form") == name else {}
        solution = chosen.solve(operator, rhs, shift, precondition, start, known)
        return dataclasses.replace(solution, memory={"form": name, "of": solution.memory})


def _by_products(work: Work, iterations: int) -> float:
    """Jv and Jᵀu are two products a layer each, twice the work of a forward pass."""
    counts = work.counts
    product = 8 * counts.forward / LAYERS + 8 * counts.activations / STREAM + 4 * counts.operations * KERNEL
    return iterations * (product + 12 * work.size / STREAM + 15 * KERNEL)


def _rows(work: Work) -> float:
    """Backward passes for the rows of U: one an output of a sample, and two to tell the samples apart."""
    counts = work.counts
    passed = 4 * counts.forward / LAYERS + 4 * counts.activations / STREAM
    if not work.graph:
        return work.rows * (passed + 2 * counts.operations * KERNEL)
    whole = DIRECT + (work.columns + 2) * (passed + counts.operations * BACKWARD)
    # rows one by one go through vectorised passes of 64, which take twice as long as plain ones
    return whole + work.rows * 2 * (passed + counts.operations * BACKWARD / 64) if counts.by_row else whole


def _dense(work: Work) -> float:
    entries = work.size**2
    formed = work.rows * entries / GEMM + work.rows * work.size / TRAFFIC
    return DIRECT + _rows(work) + formed + 9 * entries / TRAFFIC + work.size**3 / 3 / FACTOR


def _gram(work: Work) -> float:
    entries, counts = work.rows**2, work.counts
    # the lower triangle; the inputs' products are shared by a sample's outputs
    widths = sum(out + inner / work.columns for inner, out in counts.layers) + counts.whole
    moved = entries * (1.5 * len(counts.layers) + 6) + work.rows * counts.whole
    multiplied = entries * widths / GEMM
    return _rows(work) + multiplied + moved / TRAFFIC + work.rows**3 / 3 / FACTOR + 2 * _by_products(work, 1)
