"""Forms are held against float64 and against the room there is. No test looks at a clock."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from experiments.environment import UsageError
from experiments.studies import STUDIES, job
from experiments.studies.base import Effort, Form, Row, Scope, Study, UnavailableError, relative_error
from experiments.studies.drawing import bars, new_figure, plain
from experiments.studies.room import free_bytes, in_words
from experiments.studies.text import error, markdown, memory, milliseconds

CPU = torch.device("cpu")


def scope(said: list[str] | None = None) -> Scope:
    return Scope(CPU, room=10**6, quick=True, say=(said if said is not None else []).append)


def absent() -> Callable[[], Tensor]:
    raise UnavailableError("absent: pip install magic")


def forms(a: Tensor) -> list[Form]:
    return [
        Form("direct", lambda: lambda: a.mT @ a),
        Form("halves", lambda: lambda: a[:2].mT @ a[:2] + a[2:].mT @ a[2:], needed=10),
        Form("dense", lambda: lambda: a, needed=10**7),
        Form("magic", absent),
    ]


def test_rows() -> None:
    a = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    said: list[str] = []
    rows = scope(said).compare({"n": 3}, forms(a), lambda: a.double().mT @ a.double(), unit="halves")
    assert [row["form"] for row in rows] == ["direct", "halves", "dense", "magic"]
    assert all(row["n"] == 3 and row["device"] == "cpu" for row in rows) and len({tuple(row) for row in rows}) == 1
    direct, halves, dense, magic = rows
    assert direct["error"] <= 1e-6 and direct["peak_bytes"] >= 36 and direct["calls"] >= 3 and direct["reason"] is None
    low, high = direct["quartiles_ms"]
    assert 0 < low <= direct["median_ms"] <= high and halves["ratio"] == 1
    assert direct["ratio"] == pytest.approx(direct["median_ms"] / halves["median_ms"])
    assert dense["median_ms"] is None and dense["needed_bytes"] == 10**7
    assert dense["reason"] == "does not fit: 10 MB needed, 1 MB allowed" and memory(dense) == "needs 10 MB"
    assert (
        magic["reason"] == milliseconds(magic) == "absent: pip install magic" and error(magic) == memory(magic) == "-"
    )
    assert len(said) == 1 and "n 3" in said[0] and "10 MB needed" in said[0]
    json.dumps(rows, allow_nan=False)


@pytest.mark.parametrize("factor", [1.01, math.nan])
def test_a_wrong_form_ends_the_study(factor: float) -> None:
    a = torch.ones(2)
    with pytest.raises(ArithmeticError, match="twice at .* is wrong"):
        scope().compare({}, [Form("twice", lambda: lambda: factor * a)], lambda: a.double())


def test_a_form_that_runs_out_of_memory_is_reported() -> None:
    [row] = scope().compare({}, [Form("huge", lambda: lambda: torch.empty(2**55))])
    assert row["reason"] == "does not fit: out of memory"


def test_relative_error() -> None:
    true = [torch.tensor([3.0, 4.0], dtype=torch.float64), torch.zeros(1, dtype=torch.float64)]
    assert relative_error([torch.tensor([3.0, 4.5]), torch.tensor([0.01])], true) == pytest.approx(0.1)
    assert relative_error([torch.tensor([3.0, 4.0]), torch.tensor([math.nan])], true) == math.inf
    with pytest.raises(ValueError, match="shapes"):
        relative_error(torch.ones(1, 2), torch.ones(2))


def test_room() -> None:
    assert 10**7 < free_bytes(CPU) < 2**62
    assert [in_words(count) for count in (0, 999, 1049, 3.2e9, 999.7e12)] == [
        "0 B",
        "999 B",
        "1.05 kB",
        "3.2 GB",
        "1 PB",
    ]


@pytest.mark.parametrize("settings", [{"rounds": 0}, {"seconds": 0.0}, {"turn_seconds": math.nan}])
def test_an_effort_that_measures_nothing(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="measures nothing"):
        Effort(**settings)  # type: ignore[arg-type]


def one_part(size: int) -> Callable[[Scope], Iterable[Row]]:
    def measure(scope: Scope) -> Iterable[Row]:
        a = scope.randn(scope.generator(), 4, size)
        yield from scope.compare({"n": size}, forms(a), lambda: a.double().mT @ a.double())

    return measure


def draw(path: Path, rows: Sequence[Row]) -> None:
    figure = new_figure("Which is faster?", "on the CPU", (6, 3))
    axis = figure.subplots()
    plain(axis)
    names, values = [row["form"] for row in rows], [row["median_ms"] for row in rows]
    bars(axis, names, values, ["#0072B2"] * len(rows), [milliseconds(row) for row in rows])
    figure.savefig(path)


def table(rows: Sequence[Row]) -> str:
    return markdown(["form", "ms"], [[row["form"], milliseconds(row)] for row in rows])


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch) -> Study:
    study = Study("tiny", "Direct or by halves?", {"small": one_part(2), "large": one_part(3)}, table, draw)
    monkeypatch.setitem(STUDIES, "tiny", study)
    return study


def test_the_job_keeps_the_parts_that_are_not_measured_again(
    study: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(parts: Sequence[str] | None, **others: bool) -> list[tuple[str, int]]:
        settings = job.StudyJob(study="tiny", parts=parts, memory_gb=1e-3, threads=1, out=tmp_path, quick=True)
        job.run(settings)
        content = json.loads((tmp_path / "results.json").read_text())
        assert 0 < content["max_error"] <= 1e-6 and content["environment"]["threads"] == 1
        return [(row["part"], row["n"]) for row in content["rows"] if row["form"] == "direct"]

    assert run(["large"]) == [("large", 3)]
    assert run(["small"]) == [("small", 2), ("large", 3)]  # in the study's order
    assert run(None) == [("small", 2), ("large", 3)]
    output = capsys.readouterr().out
    assert (tmp_path / "table.md").read_text().strip() in output and "Direct or by halves?" in output
    assert (tmp_path / "tiny.png").stat().st_size > 5_000 and str(tmp_path / "tiny.png") in output
    with pytest.raises(UsageError, match="quick True, and this is False"):
        job.run(job.StudyJob(study="tiny", parts=["large"], threads=1, out=tmp_path))


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"parts": ["huge"]}, "'huge'.*small, large"), ({"threads": 0}, "--threads 0"), ({"memory_gb": 0.0}, "positive")],
)
def test_input_that_makes_no_sense(study: Study, tmp_path: Path, settings: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        job.run(job.StudyJob(study="tiny", out=tmp_path / "out", **settings))  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_a_study_without_parts() -> None:
    with pytest.raises(ValueError, match="no parts"):
        Study("empty", "?", {}, table, draw)
