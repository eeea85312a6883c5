import dataclasses
import json
import math
import pickle
from functools import partial
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from torch import nn

from experiments.data import load
from experiments.environment import UsageError
from experiments.optimizers import (
    OPTIMIZERS,
    AdamSettings,
    CommonSettings,
    DenseFisherSettings,
    FullBatchSettings,
    HessianFreeSettings,
    KFACSettings,
    LBFGSSettings,
    MuonSettings,
    RecipeSettings,
    SOAPSettings,
    choose_settings,
    default_optimizers,
    settings_class,
)
from experiments.problems import Problem, make
from hessfree import CG, KFAC, HessianFree, Identity, LevenbergMarquardt, Woodbury


def sized(dim: int, rows: int | None = None, outputs: int | None = None, first_loss: float = 2.0) -> Problem:
    """A problem of which nothing is asked but its name, its sizes and the height of its loss."""
    sizes = {"dim": dim, "rows": rows, "outputs": outputs or dim, "first_loss": first_loss}
    return cast(Problem, SimpleNamespace(name="made-up", **sizes))


FLAT, DIGITS, LARGE, FIXED = sized(2), sized(64), sized(784), sized(2, rows=96)
POISSON, AUTOENCODER = sized(2, 1280, 1, 1200.0), sized(784, 1500, 784, 900.0)


def test_defaults_by_dimension() -> None:
    flat = choose_settings(["hessfree", "dense-fisher", "adam", "soap"], [], FLAT)
    assert flat["hessfree"] == HessianFreeSettings(batch_size=8192, curvature_batch=1024, minimum_damping=1e-3)
    assert flat["dense-fisher"].batch_size <= 256
    assert flat["adam"] == AdamSettings(lr=None, batch_size=1024)
    assert flat["soap"] == SOAPSettings(lr=None, batch_size=1024)
    digits = choose_settings(["hessfree"], [], DIGITS)["hessfree"]
    assert digits == HessianFreeSettings(damping=0.1, batch_size=1024, curvature_batch=256, minimum_damping=1e-6)
    large = choose_settings(["hessfree", "adam", "soap"], [], LARGE)
    hessfree = large.pop("hessfree")
    assert isinstance(hessfree, HessianFreeSettings)
    assert (hessfree.batch_size, hessfree.curvature_batch, hessfree.every, hessfree.warmup) == (512, 64, 4, 0.1)
    assert large == {
        "adam": AdamSettings(batch_size=256, warmup=0.1),
        "soap": SOAPSettings(batch_size=256, warmup=0.1),
    }
    assert default_optimizers(FLAT) == ("hessfree", "dense-fisher", "adam")
    assert default_optimizers(DIGITS) == ("hessfree", "adam")


def test_fixed_rows_are_all_used_by_second_order() -> None:
    chosen = choose_settings(["hessfree", "adam", "lbfgs"], ["hessfree.samples=8"], FIXED)
    assert chosen["hessfree"] == FullBatchSettings(batch_size=96, samples=8)
    assert chosen["lbfgs"] == LBFGSSettings(batch_size=96)
    assert chosen["adam"].batch_size == 96
    assert {name: settings.step_length(0.7) == 1 for name, settings in chosen.items()} == {
        "hessfree": True,
        "adam": False,
        "lbfgs": True,
    }
    recipe = RecipeSettings.for_problem(FIXED, recipe=HessianFree)
    assert recipe.batch_size == 96 and recipe.step_length(1) == 1
    streaming = RecipeSettings.for_problem(DIGITS, recipe=HessianFree)
    assert streaming.batch_size == 1024 and streaming.step_length(1) == 0


def built(settings: FullBatchSettings | HessianFreeSettings) -> HessianFree:
    optimizer = settings.build([nn.Parameter(torch.zeros(1))], seed=0)
    assert isinstance(optimizer, HessianFree)
    return optimizer


def test_the_recipe_of_each_problem() -> None:
    flow, poisson, autoencoder = (built(FullBatchSettings.for_problem(p)) for p in (FIXED, POISSON, AUTOENCODER))
    # for a field in two dimensions the class's own recipe, number by number
    plain = HessianFree.full_batch([nn.Parameter(torch.zeros(1))], seed=0)
    assert flow.settings == plain.settings and flow.param_groups[0]["damping"] == 0.3
    assert poisson.settings.preconditioner == Woodbury(samples=None, damping_scale=1.0, update_every=3)
    assert poisson.param_groups[0]["damping"] == 100 and poisson.settings.curvature_batch is None
    assert poisson.settings.damping_rule == plain.settings.damping_rule
    assert autoencoder.settings.preconditioner == KFAC(update_every=10, damping_scale=0.1)
    assert autoencoder.param_groups[0]["damping"] == 150 and autoencoder.settings.curvature_batch == 512
    rule = LevenbergMarquardt(every=1, omega=0.5, minimum=1e-5, test="next_loss")
    assert autoencoder.settings.damping_rule == rule
    assert FullBatchSettings.for_problem(AUTOENCODER, batch_size=64).curvature_batch == 64
    with pytest.raises(UsageError, match="curvature_batch=97.*96 rows"):
        FullBatchSettings.for_problem(FIXED, curvature_batch=97).check(1)


def test_every_setting_of_a_stream_reaches_the_optimizer() -> None:
    plain = HessianFree.stochastic([nn.Parameter(torch.zeros(1))], seed=0, curvature_batch=1024)
    assert built(HessianFreeSettings()).settings == plain.settings
    cheap = built(HessianFreeSettings.for_problem(LARGE)).settings
    assert cheap.solver == CG(max_iterations=1, every=4) and cheap.curvature_batch == 64
    assert cheap.preconditioner == KFAC(power=0.5, update_every=20, warmup_updates=30)
    assert cheap.damping_rule == LevenbergMarquardt(every=20, minimum=1e-6)
    assert built(HessianFreeSettings(omega=0.8)).settings.damping_rule == LevenbergMarquardt(omega=0.8, minimum=1e-3)
    assert built(HessianFreeSettings.for_problem(LARGE, cg_iterations=3)).settings.solver == CG(max_iterations=3)
    with pytest.raises(UsageError, match="every=4.*there are 3.*cg_iterations=1"):
        HessianFreeSettings(every=4).check(1)


@pytest.mark.filterwarnings("ignore:K-FAC declines:UserWarning")  # it declines layers that the derivatives in x bypass
@pytest.mark.parametrize("name", ["poisson", "autoencoder"])
def test_the_recipes_lower_the_losses_that_they_are_made_for(name: str) -> None:
    problem = make(name)
    settings = FullBatchSettings.for_problem(problem)
    model, batch = problem.initial_model(0), problem.stream(0).draw(settings.batch_size)
    optimizer = settings.build(model.parameters(), seed=0)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = problem.loss(model, batch)
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(6)]  # type: ignore[arg-type, attr-defined]
    assert losses[-1] < 0.9 * losses[0] and losses == sorted(losses, reverse=True)


def test_a_low_loss_keeps_the_damping_low() -> None:
    one = FullBatchSettings.for_problem(sized(2, 96, outputs=1))
    assert one.damping == 0.3 and one.samples is None
    assert FullBatchSettings.for_problem(sized(784, 96)) == FullBatchSettings(batch_size=96)


@pytest.mark.parametrize("name", ["sgd", "adamw", "muon", "shampoo"])
def test_first_order_rivals(name: str) -> None:
    settings = settings_class(name, FLAT).for_problem(FLAT, lr=0.01)
    assert settings.batch_size == 1024
    problem = make("8gaussians")
    model, batch = problem.initial_model(0), problem.stream(0).draw(256)
    optimizer = settings.build(model.parameters(), seed=0)
    assert {group["lr"] for group in optimizer.param_groups} == {0.01}
    losses = []
    for _ in range(30):

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = problem.loss(model, batch)
            loss.backward()
            return loss

        losses.append(optimizer.step(closure).item())  # type: ignore[arg-type, attr-defined]
    assert losses[-1] < 0.8 * losses[0]
    with pytest.raises(ValueError, match="sweep over lr_grid"):
        settings_class(name, FLAT).for_problem(FLAT).build(model.parameters(), 0)


def test_muon_takes_kernels_for_matrices_and_leaves_vectors_to_adamw() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 3))
    start = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = MuonSettings(lr=0.1).build(model.parameters(), 0)
    parts = [[p.dim() for p in group["params"]] for group in optimizer.param_groups]
    assert parts == [[2, 2], [1, 1]]
    model(torch.randn(5, 1, 4, 4, generator=torch.Generator().manual_seed(0))).square().sum().backward()
    for group in optimizer.param_groups:
        group["lr"] = 0.01  # as the training loop does
    assert optimizer.step() is None
    steps = [(parameter - before).detach() for parameter, before in zip(model.parameters(), start, strict=True)]
    # AdamW's first step is the rate times the gradient's sign; Muon's is nearly orthogonal, its norm scaled to AdamW's
    assert all(torch.allclose(step.abs(), torch.full_like(step, 0.01), rtol=1e-3) for step in (steps[1], steps[3]))
    for matrix in (steps[0].flatten(1), steps[2]):
        singular = torch.linalg.svdvals(matrix) / (0.2 * 0.01 * max(matrix.shape) ** 0.5)
        assert ((singular > 0.5) & (singular < 1.5)).all()
    optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_streams_refuse_what_needs_fixed_rows() -> None:
    with pytest.raises(UsageError, match="lbfgs needs fixed rows.*made-up.*leave it out"):
        choose_settings(["lbfgs"], [], FLAT)
    with pytest.raises(UsageError, match="fixed rows.*made-up"):
        FullBatchSettings.for_problem(FLAT)


def test_the_length_of_steps() -> None:
    cosine = CommonSettings()
    assert [cosine.step_length(f) for f in (0, 0.5, 1, 7)] == pytest.approx([1, 0.5, 0, 0])
    assert cosine.step_length(0.25) == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))
    assert [CommonSettings(final_length=1.0).step_length(f) for f in (0, 0.5, 1)] == [1, 1, 1]
    assert CommonSettings(final_length=0.1).step_length(1) == pytest.approx(0.1)
    warm = CommonSettings(warmup=0.1)
    assert warm.step_length(0) == pytest.approx(0.01)  # a step of length zero would be lost
    assert warm.step_length(0.05) == pytest.approx(0.5 * cosine.step_length(0.05))
    assert warm.step_length(0.1) == cosine.step_length(0.1) and warm.step_length(0.8) == cosine.step_length(0.8)


def test_changes_keep_their_types() -> None:
    changes = ["hessfree.damping=1", "adam.lr=0.02", "hessfree.batch_size=64"]
    changed = choose_settings(["adam", "hessfree"], changes, FLAT)
    assert changed["adam"] == AdamSettings(lr=0.02)
    hessfree = changed["hessfree"]
    assert hessfree == HessianFreeSettings(damping=1.0, batch_size=64, curvature_batch=64)
    assert isinstance(hessfree, HessianFreeSettings) and isinstance(hessfree.damping, float)
    assert choose_settings(["adam"], ["adam.lr=none"], FLAT)["adam"].lr is None
    changes = ["hessfree.samples=none", "hessfree.preconditioner=kfac", "hessfree.curvature_batch=none"]
    full = choose_settings(["hessfree"], changes, FIXED)["hessfree"]
    assert full == FullBatchSettings(batch_size=96, samples=None, preconditioner="kfac", curvature_batch=None)
    assert choose_settings(["hessfree"], ["hessfree.samples=8"], POISSON)["hessfree"] == FullBatchSettings.for_problem(
        POISSON, samples=8
    )


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("hessfree.damping", "is no assignment.*hessfree.damping=0.1"),
        ("damping=1", "is no assignment"),
        ("sophia.lr=1", "no optimizer 'sophia'.*hessfree, dense-fisher, adam"),
        ("hessfree.dampping=1", "no setting 'dampping'.*damping, batch_size, curvature_batch"),
        ("hessfree.damping=big", "'big' is no float"),
        ("hessfree.damping=none", "'none' is no float"),
        ("hessfree.batch_size=12.5", "'12.5' is no int"),
        ("hessfree.batch_size=0", "'0' is out of range.*positive integer"),
        ("adam.lr=nan", "'nan' is out of range"),
        ("adam.lr=-1", "'-1' is out of range.*not negative"),
        ("adam.lr=inf", "'inf' is out of range"),
        ("dense-fisher.damping=0.1", "dense-fisher does not run.*--optimizers"),
    ],
)
def test_changes_that_make_no_sense(assignment: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        choose_settings(["hessfree", "adam"], [assignment], FLAT)


def test_a_word_that_makes_no_sense() -> None:
    with pytest.raises(UsageError, match="'jacobi' is unknown; choose from: woodbury, kfac"):
        choose_settings(["hessfree"], ["hessfree.preconditioner=jacobi"], FIXED)


def test_names_that_make_no_sense() -> None:
    with pytest.raises(UsageError, match="'luck' is unknown.*hessfree"):
        choose_settings(["luck"], [], FLAT)
    with pytest.raises(UsageError, match="'adam' twice"):
        choose_settings(["adam", "adam"], [], FLAT)


def test_sizes_that_are_out_of_reach() -> None:
    DenseFisherSettings().check(8706)
    with pytest.raises(UsageError, match="109584 x 109584 matrix .48 GB.*leave it out"):
        DenseFisherSettings().check(109_584)
    HessianFreeSettings().check(10**9)
    SOAPSettings().check(10**9)
    with pytest.raises(UsageError, match="curvature_batch=65.*64 rows"):
        HessianFreeSettings(batch_size=64, curvature_batch=65).check(1)


@pytest.mark.parametrize("settings", [AdamSettings(), SOAPSettings()])
def test_first_order_needs_a_learning_rate(settings: AdamSettings | SOAPSettings) -> None:
    with pytest.raises(ValueError, match="lr=None"):
        settings.build([nn.Parameter(torch.zeros(1))], seed=0)


def test_soap_leaves_wide_sides_alone() -> None:
    matrix = nn.Parameter(torch.zeros(4, 9))
    optimizer = SOAPSettings(lr=0.1, widest=8).build([matrix], seed=0)
    matrix.grad = torch.randn(4, 9, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    narrow, wide = optimizer.state[matrix]["GG"]
    assert narrow.shape == (4, 4) and len(wide) == 0


def test_recipes_can_be_sent_to_another_process() -> None:
    recipe = partial(HessianFree.full_batch, solver=CG(max_iterations=2), preconditioner=Identity())
    settings = pickle.loads(pickle.dumps(RecipeSettings(recipe=recipe, lr=0.5, batch_size=16)))
    optimizer = settings.build([nn.Parameter(torch.zeros(1))], seed=7)
    assert isinstance(optimizer, HessianFree)
    assert optimizer.settings.solver == CG(max_iterations=2) and optimizer.settings.seed == 7
    assert optimizer.param_groups[0]["lr"] == 0.5 and optimizer.settings.momentum is not None


@pytest.mark.parametrize("kind", [KFACSettings, HessianFreeSettings])
def test_the_first_layer_takes_the_moments_of_the_data(kind: type[KFACSettings] | type[HessianFreeSettings]) -> None:
    problem = make("moons")
    settings = kind.for_problem(problem, lr=0.5, data="moons")
    assert "moons" not in repr(settings)  # no setting that a user changes
    assert json.loads(json.dumps(dataclasses.asdict(settings)))["lr"] == 0.5  # a record can hold it
    parameters = list(problem.initial_model(0).parameters())
    optimizer = settings.build(parameters, seed=0)
    assert isinstance(optimizer, HessianFree) and isinstance(optimizer.settings.preconditioner, KFAC)
    [(weight, moments)] = (optimizer.settings.preconditioner.input_moments or {}).items()
    assert weight is parameters[0]
    points = load("moons").sample(4096, torch.Generator().manual_seed(1)).double()
    assert torch.allclose(moments.mean[:2], points.mean(0) / 2)
    with pytest.raises(UsageError, match="has no setting 'data'"):
        choose_settings(["kfac"], ["kfac.data=1"], FLAT)


def test_which_data_are_known() -> None:
    problem = make("moons")
    assert KFACSettings.for_problem(problem).data == "moons"
    assert HessianFreeSettings.for_problem(problem).data is None  # few inputs: a batch tells their moments
    assert KFACSettings.for_problem(FIXED).data is None and KFACSettings.for_problem(FIXED).batch_size == 96
    digits = make("digits-784")
    assert HessianFreeSettings.for_problem(digits).data == "digits-784"
    assert KFACSettings.for_problem(digits).data == "digits-784"


@pytest.mark.parametrize("problem", [FLAT, FIXED])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_takes_the_closure(name: str, problem: Problem) -> None:
    if name == "lbfgs" and problem.rows is None:
        return  # refuses: tested above
    torch.manual_seed(0)
    model = nn.Linear(2, 2)
    x, y = torch.randn(96, 2), torch.randn(96, 2)
    settings = settings_class(name, problem).for_problem(problem, lr=0.1, batch_size=96)
    optimizer = settings.build(model.parameters(), seed=0)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(4)]  # type: ignore[arg-type, attr-defined]
    # L-BFGS is at the minimum after a step, and rounds
    assert all(later <= earlier * (1 + 1e-6) for earlier, later in zip(losses, losses[1:], strict=False))
    assert losses[-1] < losses[0]
    assert {group["lr"] for group in optimizer.param_groups} == {0.1}
