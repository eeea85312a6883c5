import dataclasses
import pickle
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import nn

from experiments.benchmark import ablation
from experiments.benchmark.grids import TRIALS
from experiments.benchmark.suite import BUDGETS, CONTENDERS, CORE, EXTENDED, contenders
from experiments.problems import PROBLEMS, Problem, make
from hessfree import CG, KFAC, HessianFree, Identity, LevenbergMarquardt


def sized(dim: int, rows: int | None = None, outputs: int | None = None, first_loss: float = 2.0) -> Problem:
    """A problem of which nothing is asked but its name, its sizes and the height of its loss."""
    outputs = outputs or dim
    return cast(
        Problem,
        SimpleNamespace(
            name="made-up",
            dim=dim,
            rows=rows,
            outputs=outputs,
            first_loss=first_loss,
            initial_model=lambda seed: nn.Linear(dim, outputs),
        ),
    )


POISSON, AUTOENCODER = sized(2, 1280, 1, 1200.0), sized(784, 1500, 784, 900.0)
SIZES = [sized(2), sized(64), sized(784), sized(2, 4096), sized(784, 1500), POISSON, AUTOENCODER]
EVERYONE = tuple(CONTENDERS)


def test_the_suite_exists() -> None:
    assert set(BUDGETS) <= set(PROBLEMS) and set(ablation.PROBLEMS) <= set(BUDGETS)


@pytest.mark.parametrize("problem", SIZES)
def test_each_contender_has_as_many_trials_as_any_other(problem: Problem) -> None:
    names = contenders(problem, EVERYONE)
    assert {"hessfree", "kfac", "adam", "soap", "sgd", "adamw", "muon", "shampoo"} <= set(names)
    assert ("lbfgs" in names) == (problem.rows is not None)
    for name in names:
        grid = CONTENDERS[name].grid(problem)
        assert len(grid) == TRIALS == len({str(changes) for changes in grid})
        for changes in grid:
            settings: Any = CONTENDERS[name].settings(problem, **changes)
            assert changes.items() <= vars(settings).items()
            settings.check(10**4)
            pickle.loads(pickle.dumps(settings)).build([nn.Parameter(torch.zeros(1))], 0)
            if problem.rows is not None:
                assert settings.batch_size <= problem.rows


@pytest.mark.parametrize("problem", SIZES)
def test_the_first_guess_is_the_default_recipe(problem: Problem) -> None:
    for name in ("hessfree", "kfac", "gram", "dense-fisher"):
        if name in contenders(problem, EVERYONE):
            contender = CONTENDERS[name]
            assert contender.settings(problem, **contender.grid(problem)[0]) == contender.settings(problem)


def test_a_record_can_hold_every_grid() -> None:
    for problem in SIZES:
        for name in contenders(problem, EVERYONE):
            grid = CONTENDERS[name].grid(problem)
            assert all(set(changes) == set(grid[0]) for changes in grid)  # a table of trials has no gaps
            assert all(isinstance(value, int | float) for changes in grid for value in changes.values())


def test_contenders_by_name() -> None:
    assert contenders(sized(2), ["lbfgs", "adam"]) == ["adam"]
    assert contenders(sized(2, 96), ["lbfgs", "adam"]) == ["adam", "lbfgs"]
    assert contenders(sized(2), ["dense-fisher"]) == ["dense-fisher"]
    assert contenders(sized(784), ["dense-fisher"]) == []  # 615 thousand parameters


def test_who_runs_where_nobody_is_named() -> None:
    assert set(EXTENDED) <= set(CORE) <= set(BUDGETS)
    assert contenders(sized(2)) == ["hessfree", "adam", "soap"]
    assert contenders(POISSON) == ["hessfree", "adam", "soap", "lbfgs"]
    assert contenders(sized(784)) == ["hessfree", "kfac", "adam", "soap"]
    wide = sized(2)
    wide.name = EXTENDED[0]  # type: ignore[misc]
    assert contenders(wide) == [name for name in EVERYONE if name != "lbfgs"]


@pytest.mark.parametrize("problem", SIZES)
def test_every_variation_changes_one_thing(problem: Problem) -> None:
    varied = ablation.variations(problem, {})
    built = {}
    for name, settings in varied.items():
        optimizer = pickle.loads(pickle.dumps(settings)).build([nn.Parameter(torch.zeros(1))], 0)
        assert isinstance(optimizer, HessianFree)
        strategies = {one.name: getattr(optimizer.settings, one.name) for one in dataclasses.fields(optimizer.settings)}
        numbers = (settings.batch_size, settings.final_length, settings.lr, optimizer.param_groups[0]["damping"])
        built[name] = strategies | dict(zip(("batch", "final", "lr", "damping"), numbers, strict=True))
    base = built.pop(ablation.BASE)
    for name, one in built.items():
        changed = {key for key, value in one.items() if value != base[key]}
        # a variation may be what is already the recipe
        allowed = {"preconditioner", "solver"} if "CG" in name else set(list(changed)[:1])
        assert changed <= allowed or changed <= {"batch", "curvature_batch"}, name


def test_variations_start_from_what_was_tuned() -> None:
    streaming = sized(2)
    tuned = {"made-up": {"hessfree": {"chosen": {"batch_size": 4096, "minimum_damping": 1e-5}}}}
    varied = ablation.variations(streaming, tuned)
    base = varied[ablation.BASE].build([nn.Parameter(torch.zeros(1))], 0)
    assert isinstance(base, HessianFree)
    assert varied[ablation.BASE].batch_size == 4096
    assert base.settings.damping_rule == LevenbergMarquardt(every=5, omega=0.8, minimum=1e-5)
    assert base.settings.curvature_batch == 512 and base.settings.solver == CG(max_iterations=3)
    assert base.settings.preconditioner == KFAC()
    plain = varied["no preconditioner, CG 10"].build([nn.Parameter(torch.zeros(1))], 0)
    assert isinstance(plain, HessianFree)
    assert plain.settings.preconditioner == Identity() and plain.settings.solver == CG(max_iterations=10)
    assert plain.settings.damping_rule == base.settings.damping_rule
    assert varied["half the batch"].batch_size == 2048


def test_variations_keep_the_rest_of_a_recipe() -> None:
    varied = ablation.variations(AUTOENCODER, {"made-up": {"hessfree": {"chosen": {"damping": 30.0}}}})
    one = varied["damping test at every 5th step"].build([nn.Parameter(torch.zeros(1))], 3)
    assert isinstance(one, HessianFree)
    assert one.settings.damping_rule == LevenbergMarquardt(every=5, omega=0.5, minimum=1e-5, test="replay")
    assert one.settings.preconditioner == KFAC(update_every=10) and one.settings.curvature_batch == 512
    assert one.param_groups[0]["damping"] == 30 and one.settings.seed == 3
    digits = make("digits-784")
    base = ablation.variations(digits, {})["constant damping"]
    parameters = list(digits.initial_model(0).parameters())
    known = base.build(parameters, 0)
    assert base.warmup == 0.1 and isinstance(known, HessianFree)
    assert isinstance(kfac := known.settings.preconditioner, KFAC) and kfac.input_moments
    assert [weight is parameters[0] for weight in kfac.input_moments] == [True]
