import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from experiments import main_job
from experiments.checkpoint import Checkpoint
from experiments.optimizers import AdamSettings, HessianFreeSettings
from experiments.records import Budget, Point
from experiments.tensorboard_log import TensorBoardLog, layout
from experiments.training import Task, Training

MODEL = nn.Linear(1, 1)
CONTENDERS = {"hessfree": HessianFreeSettings(), "adam": AdamSettings(lr=0.03)}


def point(step: int, seconds: float, excess: float, **internals: float) -> Point:
    return Point(step, 10 * step, seconds, excess + 5, {"excess_loss": excess, "holdout_loss": excess + 6}, internals)


POINTS = {
    "hessfree": [point(0, 0.5, 8.0), point(6, 3.0, 0.1, **{"optimizer/damping": 0.3, "optimizer/ratio": math.nan})],
    "adam": [point(0, 0.1, 8.0), point(4, 2.0, 0.4)],
}


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {"samples": torch.zeros(4, 6, 3, dtype=torch.uint8)}


@pytest.fixture
def events(tmp_path: Path) -> dict[str, Any]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for append in (False, False, True):  # the second comparison replaces the first, and is gone on with
        log = TensorBoardLog(
            tmp_path,
            CONTENDERS,
            score="excess_loss",
            budget=Budget(2.0),
            now=1000.0,
            snapshots=dict.fromkeys(CONTENDERS, snapshot),
            append=append,
        )
        for name, points in POINTS.items():
            for one in points[1:] if append else points[:1]:
                log(name, one, MODEL)
        log.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adam", "hessfree"]  # no further, empty runs
    return {name: EventAccumulator(str(tmp_path / name)).Reload() for name in CONTENDERS}


def scalars(events: Any, tag: str) -> list[Any]:
    # files of one process and second are read in the order of their names, where a tenth writer comes before a ninth
    return sorted(events.Scalars(tag), key=lambda event: event.step)


def test_equal_tags_by_step_time_and_samples(events: dict[str, Any]) -> None:
    tags = {name: set(one.Tags()["scalars"]) for name, one in events.items()}
    losses = {
        f"loss/{loss}{by}"
        for loss in ("train", "excess", "log10_excess", "holdout")
        for by in ("", "_vs_ms", "_vs_samples")
    }
    assert tags["adam"] == losses and tags["hessfree"] == losses | {"optimizer/damping"}
    for name, points in POINTS.items():
        by_step = scalars(events[name], "loss/excess")
        assert [(one.step, one.value) for one in by_step] == [
            (p.step, pytest.approx(p.losses["excess_loss"])) for p in points
        ]
        assert [one.wall_time for one in by_step] == [1000 + p.seconds for p in points]
        assert [one.step for one in scalars(events[name], "loss/train_vs_samples")] == [p.samples for p in points]
    assert [one.step for one in scalars(events["adam"], "loss/excess_vs_ms")] == [100, 2000]
    assert scalars(events["adam"], "loss/log10_excess")[-1].value == pytest.approx(math.log10(0.4))


def test_a_slow_step_does_not_stretch_the_axis(events: dict[str, Any]) -> None:
    last = scalars(events["hessfree"], "loss/excess_vs_ms")[-1]
    assert last.step == 2000


@pytest.mark.parametrize("resumed", [False, True])
def test_the_loss_at_the_end_of_the_budget_is_that_of_before_the_step(resumed: bool, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    first, last = POINTS["hessfree"]

    def log(**changes: Any) -> TensorBoardLog:
        return TensorBoardLog(tmp_path, CONTENDERS, score="excess_loss", budget=Budget(2.0), now=0.0, **changes)

    one = log()
    one("hessfree", first, MODEL)
    if resumed:
        one.close()
        one = log(append=True, previous={"hessfree": first, "adam": None})
    one("hessfree", last, MODEL)
    one.close()
    shown = EventAccumulator(str(tmp_path / "hessfree")).Reload().Scalars("loss/excess_vs_ms")
    assert [(one.step, one.value) for one in shown] == [(500, 8.0), (2000, 8.0)]


def test_pictures(events: dict[str, Any]) -> None:
    for name, points in POINTS.items():
        assert sorted(one.step for one in events[name].Images("samples")) == [p.step for p in points]


def test_settings_and_layout_are_in_the_runs(events: dict[str, Any]) -> None:
    from tensorboard.plugins.custom_scalar import layout_pb2
    from tensorboard.plugins.hparams import plugin_data_pb2

    def content(name: str, tag: str) -> bytes:
        return events[name].summary_metadata[tag].plugin_data.content

    starts = {}
    for name in CONTENDERS:
        data = plugin_data_pb2.HParamsPluginData.FromString(content(name, "_hparams_/session_start_info"))
        starts[name] = dict(data.session_start_info.hparams)
    assert starts["adam"]["lr"].number_value == 0.03 and "damping" not in starts["adam"]
    assert starts["hessfree"]["damping"].number_value == 0.3
    data = plugin_data_pb2.HParamsPluginData.FromString(content("hessfree", "_hparams_/experiment"))
    assert {info.name for info in data.experiment.hparam_infos} == starts["adam"].keys() | starts["hessfree"].keys()
    [tensor] = events["hessfree"].Tensors("custom_scalars__config__")
    page = layout_pb2.Layout.FromString(tensor.tensor_proto.string_val[0])
    assert [category.title for category in page.category] == ["Comparison", "Inside the optimizer"]
    assert page.category[0].chart[0].multiline.tag == ["^loss/log10_excess_vs_ms$"]


def test_the_layout_names_what_a_report_has() -> None:
    from hessfree.report import StepReport

    known = StepReport(1, True, "", 0.0).scalars("optimizer/")
    charts = layout("excess")["Inside the optimizer"].values()
    assert all(tag.strip("^$") in known for _, tags in charts for tag in tags)


def test_runs_of_an_earlier_comparison_make_way(tmp_path: Path) -> None:
    def events_after(*names: str, append: bool = False) -> list[str]:
        contenders = {name: AdamSettings(lr=0.1) for name in names}
        TensorBoardLog(tmp_path, contenders, score="excess_loss", budget=Budget(2.0), now=0.0, append=append).close()
        return sorted(path.parent.name for path in tmp_path.rglob("events.out.tfevents.*"))

    assert events_after("hessfree", "soap") == ["hessfree", "soap"]
    (tmp_path / "soap" / "notes.txt").write_text("mine")
    assert events_after("hessfree") == ["hessfree"]  # the old curve of soap does not stay beside the new one
    assert (tmp_path / "soap" / "notes.txt").read_text() == "mine"
    assert events_after("adam", append=True) == ["adam", "hessfree"]


class Opened(Exception):
    pass


def test_a_job_that_goes_on_tells_of_its_last_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = main_job.Job(
        width=4, optimizers=["adam", "sgd"], assignments=["adam.lr=0.1", "sgd.lr=0.1"], out=tmp_path, resume=True
    )
    task = Task(job.problem(), "adam", AdamSettings(lr=0.1), seed=0, budget=Budget(steps=9), moments=(1.0, 9.0))
    training = Training(task)
    training.begin()
    training.step()
    Checkpoint(tmp_path / "checkpoint.pt", job.deciding()).watch(training)

    def log(*_: Any, previous: dict[str, Point | None], append: bool, **__: Any) -> None:
        assert append and previous == {"adam": training.points[-1], "sgd": None}
        raise Opened

    monkeypatch.setattr(main_job, "TensorBoardLog", log)
    with pytest.raises(Opened):
        main_job.run_job(job)
