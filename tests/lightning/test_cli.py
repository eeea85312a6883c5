"""The optimizer from a command line: the run is the one of the same strategies made in Python."""

from __future__ import annotations

import inspect
import sys
from typing import Any

import lightning
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, instantiate_class
from torch import Tensor
from torch.optim import Optimizer

import hessfree
from hessfree.damping import DampingRule
from hessfree.lightning import HessianFreeMonitor
from hessfree.line_search import LineSearch
from hessfree.momentum import Momentum
from hessfree.preconditioners import Preconditioner
from hessfree.solvers import Forcing, Solver
from tests.lightning.modules import Regression, fit, flat, loader, network, quiet

OPTIMIZER = "--optimizer hessfree.HessianFree"
LINES = {
    "numbers": ("--optimizer.damping 1 --optimizer.curvature_batch 0.5", {"damping": 1.0, "curvature_batch": 0.5}),
    "class paths": (
        "--optimizer.solver hessfree.CG --optimizer.solver.max_iterations 5 "
        "--optimizer.preconditioner hessfree.Identity",
        {"solver": hessfree.CG(max_iterations=5), "preconditioner": hessfree.Identity()},
    ),
    "settings of the defaults": (
        "--optimizer.preconditioner.factors exact --optimizer.damping_rule.every 1",
        {"preconditioner": hessfree.KFAC(factors="exact"), "damping_rule": hessfree.LevenbergMarquardt(every=1)},
    ),
    "two levels": (
        "--optimizer.solver.tolerance hessfree.EisenstatWalker --optimizer.solver.tolerance.first 0.25 "
        "--optimizer.momentum hessfree.QuadraticModelMomentum",
        {
            "solver": hessfree.CG(max_iterations=3, tolerance=hessfree.EisenstatWalker(first=0.25)),
            "momentum": hessfree.QuadraticModelMomentum(),
        },
    ),
}
PLACES = {  # a strategy's protocol, and the method by which to know those that have it
    "solver": (Solver, "solve"),
    "solver.tolerance": (Forcing, "tolerance"),
    "preconditioner": (Preconditioner, "inverse"),
    "damping_rule": (DampingRule, "wants_ratio"),
    "line_search": (LineSearch, "search"),
    "momentum": (Momentum, "combine"),
}


class Plain(lightning.LightningModule):
    """A module that leaves the choice of its optimizer to the command line."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.mse_loss(self.net(batch[0]), batch[1])

    def train_dataloader(self) -> Any:
        return loader()


@pytest.fixture(autouse=True)
def no_warnings_of_the_parser(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning calls it in ways that it deprecates."""
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")


def run(monkeypatch: pytest.MonkeyPatch, line: str) -> lightning.Trainer:
    """Run a program that is nothing but a `LightningCLI`, with this command line."""
    monkeypatch.setattr(sys, "argv", ["train.py", "fit", *OPTIMIZER.split(), *line.split()])
    settings = {"save_config_callback": None, "seed_everything_default": False}
    return LightningCLI(Plain, trainer_defaults=quiet(max_epochs=1), **settings).trainer


@pytest.mark.parametrize("case", LINES)
def test_the_run_is_the_one_from_python(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    line, settings = LINES[case]
    trainer = run(monkeypatch, f"{line} --trainer.callbacks+=hessfree.lightning.HessianFreeMonitor")
    module = Regression(lambda parameters: hessfree.HessianFree(parameters, **settings))
    expected = fit(module, callbacks=[HessianFreeMonitor()]).optimizers[0]
    assert trainer.optimizers[0].settings == expected.settings
    assert torch.equal(flat(trainer.lightning_module), flat(module)) and not torch.equal(flat(module), flat(network()))
    assert same_numbers(trainer.callback_metrics) == same_numbers(module.trainer.callback_metrics)


def same_numbers(logged: dict[str, Tensor]) -> dict[str, float]:
    """What was logged, but for the times."""
    return {name: float(value) for name, value in logged.items() if "seconds" not in name}


@pytest.mark.parametrize("place", PLACES)
def test_every_strategy_has_a_class_path(place: str) -> None:
    """Strategies derive from their protocol: a dataclass that has no other base is, for a parser, only its own type."""
    protocol, method = PLACES[place]
    classes = filter(inspect.isclass, vars(hessfree).values())
    strategies = [strategy for strategy in classes if callable(getattr(strategy, method, None))]
    assert strategies
    for strategy in strategies:
        parser = LightningArgumentParser()
        parser.add_optimizer_args((Optimizer,))
        line = f"{OPTIMIZER} --optimizer.{place} hessfree.{strategy.__name__}"
        made = parser.instantiate_classes(parser.parse_args(line.split())).optimizer
        optimizer = instantiate_class((network().parameters(),), made)
        found = optimizer.settings
        for name in place.split("."):
            found = getattr(found, name)
        assert type(found) is strategy and protocol in strategy.__mro__


def test_a_setting_out_of_range_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"max_iterations=-1 must be an integer, 0 or more"):
        run(monkeypatch, "--optimizer.solver.max_iterations -1")
