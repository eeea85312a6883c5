"""Trainer settings: the step is the reference's, or an error names the cure."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision

from tests.distributed.training import same_bits
from tests.lightning import two_processes
from tests.lightning.modules import Regression, fit, flat, network
from tests.lightning.reference import BATCHES, DOUBLE
from tests.lightning.settings import ROWS, Row


@pytest.mark.filterwarnings("ignore:.*detect_anomaly=True.*")
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.setting)
def test_the_step_is_the_reference_step(row: Row) -> None:
    assert row.error() <= row.bound


def test_half_precision_with_a_scaler_names_the_cure() -> None:
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    module = Regression()
    with pytest.raises(RuntimeError, match=r"without a closure.*precision='16-mixed'.*use bfloat16 or float32"):
        fit(module, plugins=[plugin])
    assert torch.equal(flat(module.net), flat(network()))


def test_two_processes_with_a_monitor_are_one() -> None:
    (first, written), (second, nothing) = two_processes.both("watched")
    assert same_bits(first, second)
    module = two_processes.Logged()
    trainer = fit(module, two_processes.joined(), max_epochs=3, callbacks=[two_processes.HessianFreeMonitor()])
    alone = two_processes.summary(module, trainer)
    assert float((first["parameters"] - alone["parameters"]).norm() / alone["parameters"].norm()) <= 1e-10
    assert first["dampings"] == pytest.approx(alone["dampings"], rel=1e-12) and len(set(first["dampings"])) > 3
    for ours, theirs in zip(first["reports"], alone["reports"], strict=True):
        assert ours[:3] == theirs[:3] and ours[1] == "traced"  # not hidden by how Lightning calls a wrapped module
        assert ours[3:] == pytest.approx(theirs[3:], rel=1e-9)
    shared, single = dict(first["metrics"]), dict(alone["metrics"])
    assert shared.pop("hessfree/curvature_samples") == 8  # a process counts its own
    assert single.pop("hessfree/curvature_samples") == 16
    assert shared == pytest.approx(single, rel=1e-6)
    # written by the first process: a line of the monitor's and one of `mine` a step, and its mean at an epoch's end
    assert len(written) == 1 + 3 * (2 * BATCHES + 1) and nothing == []


def test_an_error_on_one_process_ends_both() -> None:
    (told, first), (raised, second) = two_processes.both("trouble")
    assert raised == "ValueError: no such sample"
    assert told.startswith("RankError: rank 1 of 2 failed") and raised in told
    assert torch.equal(first, second) and not torch.equal(first, flat(network(DOUBLE)))
