"""HessianFree with one thing changed at a time."""

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from experiments.benchmark.grids import Changes
from experiments.benchmark.tuning import Tuned
from experiments.optimizers import FullBatchSettings, HessianFreeSettings, RecipeSettings
from experiments.problems import Problem
from hessfree import (
    CG,
    KFAC,
    ConstantDamping,
    EisenstatWalker,
    EmpiricalFisherDiagonal,
    HessianFree,
    Identity,
    Jacobi,
    Nystrom,
    QuadraticModelMomentum,
    Woodbury,
)

PROBLEMS = ("8gaussians-fixed", "8gaussians-stable", "digits")  # no noise, a little, and many dimensions
BUDGET_SECONDS = 8.0
BASE = "default"


@dataclass(frozen=True)
class Variation:
    """One change to the recipe that a problem is solved with.

    Attributes:
        arguments: Of HessianFree, that differ from the recipe's.
        settings: Of `RecipeSettings` (batch, length of steps), that differ.
        damping: Of the recipe's Levenberg-Marquardt rule, that differ.
        start: Factor on λ of the first step.
        streaming: Whether it is tried where rows are drawn anew for ever.
        fixed: Whether it is tried where rows are fixed.
    """

    arguments: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    damping: Mapping[str, Any] = field(default_factory=dict)
    start: float = 1.0
    streaming: bool = True
    fixed: bool = True


def _ten(preconditioner: Any) -> Variation:
    """A weak preconditioner needs more iterations than the recipe has: give each ten."""
    return Variation({"preconditioner": preconditioner, "solver": CG(max_iterations=10)})


VARIATIONS: dict[str, Variation] = {
    BASE: Variation(),
    "no preconditioner, CG 10": _ten(Identity()),
    "Jacobi, CG 10": _ten(Jacobi()),
    "empirical Fisher diagonal, CG 10": _ten(EmpiricalFisherDiagonal()),
    "Nystrom 50, CG 10": _ten(Nystrom(rank=50)),
    "K-FAC, CG 10": _ten(KFAC()),
    **{
        f"K-FAC, CG {n}": Variation({"preconditioner": KFAC(), "solver": CG(max_iterations=n)})
        for n in (0, 1, 2, 3, 5, 20)
    },
    **{
        f"Woodbury 256, CG {n}": Variation({"preconditioner": Woodbury(), "solver": CG(max_iterations=n)})
        for n in (0, 3)
    },
    **{f"curvature on {n} rows": Variation({"curvature_batch": n}) for n in (256, 512)},
    "curvature on all rows": Variation({"curvature_batch": None}, fixed=False),
    "no momentum": Variation({"momentum": None}, streaming=False),
    "two-dimensional model with the previous step": Variation({"momentum": QuadraticModelMomentum()}, fixed=False),
    "K-FAC learned at every step": Variation({"preconditioner": KFAC(update_every=1)}, fixed=False),
    "K-FAC learned at every 20th step": Variation({"preconditioner": KFAC(update_every=20)}, fixed=False),
    "Woodbury learned at every 2nd step": Variation({"preconditioner": Woodbury(update_every=2)}, streaming=False),
    "Woodbury learned at every 50th step": Variation({"preconditioner": Woodbury(update_every=50)}, streaming=False),
    "K-FAC, exact factors": Variation({"preconditioner": KFAC(factors="exact")}, fixed=False),
    "K-FAC to the power 1/2": Variation({"preconditioner": KFAC(power=0.5)}, fixed=False),
    "CG 3, warm start": Variation({"solver": CG(max_iterations=3, warm_start=0.95)}, fixed=False),
    "CG up to 20, forcing term": Variation({"solver": CG(max_iterations=20, tolerance=EisenstatWalker())}, fixed=False),
    "CG 1 at every 4th step": Variation({"solver": CG(max_iterations=1, every=4)}, fixed=False),
    "model over the last 3 steps": Variation({"momentum": QuadraticModelMomentum(history=3)}),
    "gradient averaged, 0.9": Variation({"gradient_ema": 0.9}, fixed=False),
    "constant damping": Variation({"damping_rule": ConstantDamping()}),
    "damping from ten times as high": Variation(start=10.0),
    "damping from a tenth": Variation(start=0.1),
    "damping test at every step": Variation(damping={"every": 1, "test": "replay"}),
    "damping test at every 5th step": Variation(damping={"every": 5, "test": "replay"}, streaming=False),
    "damping test at every 20th step": Variation(damping={"every": 20}, fixed=False),
    "steps of constant length": Variation(settings={"final_length": 1.0}, fixed=False),
    "cosine on fixed rows": Variation(settings={"final_length": 0.0}, streaming=False),
    "half the batch": Variation(settings={"batch_share": 0.5}, fixed=False),
    "twice the batch": Variation(settings={"batch_share": 2.0}, fixed=False),
}


def variations(problem: Problem, tuned: Tuned) -> dict[str, RecipeSettings]:
    """Give the settings of every variation that makes sense on a problem.

    Args:
        problem: What is solved.
        tuned: The settings around which things are varied are those that HessianFree was tuned to on this problem, or
            its defaults.

    Returns:
        Settings by name of the variation.
    """
    chosen: Changes = tuned.get(problem.name, {}).get("hessfree", {}).get("chosen", {})
    settings: FullBatchSettings | HessianFreeSettings
    if problem.rows is not None:
        settings = FullBatchSettings.for_problem(problem, **chosen)
        return {name: _vary(one, settings) for name, one in VARIATIONS.items() if one.fixed}
    settings = HessianFreeSettings.for_problem(problem, **chosen)
    return {name: _vary(one, settings) for name, one in VARIATIONS.items() if one.streaming}


def _vary(variation: Variation, settings: FullBatchSettings | HessianFreeSettings) -> RecipeSettings:
    """Say how a recipe is changed, and what stays of the settings of its rows and the length of its steps."""
    changed = dict(variation.settings)
    batch_size = round(changed.pop("batch_share", 1.0) * settings.batch_size)
    arguments = dict(variation.arguments)
    rows = arguments.get("curvature_batch", settings.curvature_batch)
    if isinstance(rows, int):
        arguments["curvature_batch"] = min(rows, batch_size)
    plain = RecipeSettings(
        recipe=_Changed(settings, arguments, variation.damping, variation.start),
        lr=settings.lr,
        batch_size=batch_size,
        warmup=settings.warmup,
        final_length=settings.final_length,
    )
    return dataclasses.replace(plain, **changed)


@dataclass(frozen=True)
class _Changed:
    """Builds the optimizer of some settings, and another of its strategies with some of them changed.

    So nothing of a recipe is written twice. The moments of the data, where a recipe has them, are given to the
    network's own weights, which are known only then. What it is written as, in the record of a run, says what it does.
    """

    settings: FullBatchSettings | HessianFreeSettings
    arguments: Mapping[str, Any]
    damping: Mapping[str, Any]
    start: float

    def __call__(self, parameters: Iterable[nn.Parameter], *, lr: float, seed: int) -> HessianFree:
        params = list(parameters)
        optimizer = self.settings.build(params, seed)
        assert isinstance(optimizer, HessianFree)
        own = {one.name: getattr(optimizer.settings, one.name) for one in dataclasses.fields(optimizer.settings)}
        own["damping_rule"] = dataclasses.replace(own["damping_rule"], **self.damping)
        return HessianFree(
            params,
            lr=lr,
            damping=self.start * self.settings.damping,
            weight_decay=self.settings.weight_decay,
            **own | dict(self.arguments),
        )
