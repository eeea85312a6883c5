"""Trainer settings: the step is the reference's, or an error names the cure."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision

from tests.lightning.modules import Regression, fit, flat, network
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
