import pytest
import torch
from torch import nn

from experiments.environment import UsageError
from experiments.optimizers import (
    OPTIMIZERS,
    AdamSettings,
    DenseFisherSettings,
    HessianFreeSettings,
    choose_settings,
    default_optimizers,
)


def test_defaults_by_dimension() -> None:
    flat = choose_settings(["hessfree", "dense-fisher", "adam"], [], dim=2)
    assert flat["hessfree"] == HessianFreeSettings(batch_size=8192, curvature_batch=1024, minimum_damping=1e-3)
    assert flat["dense-fisher"].batch_size <= 256
    assert flat["adam"] == AdamSettings(lr=None, batch_size=1024)
    digits = choose_settings(["hessfree"], [], dim=64)["hessfree"]
    assert digits == HessianFreeSettings(damping=0.1, batch_size=1024, curvature_batch=256, minimum_damping=1e-6)
    assert default_optimizers(2) == ("hessfree", "dense-fisher", "adam")
    assert default_optimizers(64) == ("hessfree", "adam")


def test_changes_keep_their_types() -> None:
    changed = choose_settings(["adam", "hessfree"], ["hessfree.damping=1", "adam.lr=0.02", "hessfree.batch_size=64"], 2)
    assert changed["adam"] == AdamSettings(lr=0.02)
    hessfree = changed["hessfree"]
    assert hessfree == HessianFreeSettings(damping=1.0, batch_size=64, curvature_batch=64)
    assert isinstance(hessfree, HessianFreeSettings) and isinstance(hessfree.damping, float)
    assert choose_settings(["adam"], ["adam.lr=none"], 2)["adam"].lr is None


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
        choose_settings(["hessfree", "adam"], [assignment], dim=2)


def test_names_that_make_no_sense() -> None:
    with pytest.raises(UsageError, match="'sgd' is unknown.*hessfree"):
        choose_settings(["sgd"], [], dim=2)
    with pytest.raises(UsageError, match="'adam' twice"):
        choose_settings(["adam", "adam"], [], dim=2)


def test_sizes_that_are_out_of_reach() -> None:
    DenseFisherSettings().check(8706)
    with pytest.raises(UsageError, match="109584 x 109584 matrix .48 GB.*leave it out"):
        DenseFisherSettings().check(109_584)
    HessianFreeSettings().check(10**9)
    with pytest.raises(UsageError, match="curvature_batch=65.*64 rows"):
        HessianFreeSettings(batch_size=64, curvature_batch=65).check(1)


def test_adam_needs_a_learning_rate() -> None:
    with pytest.raises(ValueError, match="lr=None"):
        AdamSettings().build([nn.Parameter(torch.zeros(1))], seed=0)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_takes_the_closure(name: str) -> None:
    torch.manual_seed(0)
    model = nn.Linear(2, 2)
    x, y = torch.randn(32, 2), torch.randn(32, 2)
    settings = OPTIMIZERS[name].for_dimension(2, lr=0.1, batch_size=32)
    optimizer = settings.build(model.parameters(), seed=0)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(4)]  # type: ignore[arg-type, attr-defined]
    assert losses == sorted(losses, reverse=True)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1]
