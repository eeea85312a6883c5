"""The job of every study in scripts/benchmark.py: checked, measured part by part, saved after each, and shown."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.benchmark import store
from experiments.environment import UsageError, choose_device, describe, prepare_directory, require_extras
from experiments.studies import STUDIES
from experiments.studies.base import Row, Scope, Study
from experiments.studies.room import free_bytes
from experiments.timing import torch_threads

_SHARE = 0.5  # of the free memory, for one form: what it needs is counted without temporaries


@dataclass(frozen=True, kw_only=True)
class StudyJob:
    """What the user asks for.

    Attributes:
        study: A name of `STUDIES`.
        parts: Which of its parts; None: all. Rows of the others stay as results.json has them.
        memory_gb: GB (10⁹ bytes) that one form may need; None: half of what is free.
        threads: Of torch.
        device: "auto" or a torch device.
        out: Directory for what is written; None: runs/<study>.
        quick: Small sizes, which show that everything runs.
    """

    study: str
    parts: Sequence[str] | None = None
    memory_gb: float | None = None
    threads: int = 2
    device: str = "cpu"
    out: Path | None = None
    quick: bool = False

    def check(self) -> Study:
        """Check what can be checked before anything is measured.

        Returns:
            The study.

        Raises:
            UsageError: If something asked for is not possible.
        """
        study = STUDIES[self.study]
        if self.threads < 1:
            raise UsageError(f"--threads {self.threads} is none; give 1 or more")
        if self.memory_gb is not None and not self.memory_gb > 0:
            raise UsageError(f"--memory-gb {self.memory_gb:g} leaves no room; give a positive number")
        for name in self.parts or ():
            if name not in study.parts:
                raise UsageError(f"--parts {name!r} is unknown; choose from: {', '.join(study.parts)}")
        require_extras(["matplotlib", *study.extras])
        return study


def run(job: StudyJob) -> dict[str, Any]:
    """Measure, save and show.

    Args:
        job: What the user asks for.

    Returns:
        What results.json holds: `environment`, `rows` (each with its `part`) and `max_error`, the largest `error` of
        a row; None where none was measured.

    Raises:
        UsageError: Before anything is measured, if something asked for is not possible.
        ArithmeticError: If a form is wrong.
    """
    study = job.check()
    device = choose_device(job.device)
    out = prepare_directory(job.out if job.out is not None else Path("runs") / study.name)
    with torch_threads(job.threads):
        environment: dict[str, Any] = describe(device) | {"cores": os.cpu_count(), "quick": job.quick}
        path = out / "results.json"
        chosen = list(study.parts) if job.parts is None else [name for name in study.parts if name in job.parts]
        rows = [] if job.parts is None else store.read_rows(path, environment)
        room = int(_SHARE * free_bytes(device)) if job.memory_gb is None else int(job.memory_gb * 1e9)
        _say(f"{study.question} ({device}, {job.threads} threads)")
        for name in chosen:
            found = [{"part": name} | row for row in study.parts[name](Scope(device, room, job.quick, say=_say))]
            rows = _in_order(study, [*(row for row in rows if row.get("part") != name), *found])
            content = {"environment": environment, "max_error": _largest(rows), "rows": rows}
            store.write_json(path, content)
    _show(study, out, content)
    return content


def _in_order(study: Study, rows: Sequence[Row]) -> list[Row]:
    return [row for name in study.parts for row in rows if row.get("part") == name]


def _largest(rows: Sequence[Row]) -> float | None:
    return max((row["error"] for row in rows if row.get("error") is not None), default=None)


def _show(study: Study, out: Path, content: dict[str, Any]) -> None:
    text = study.table(content["rows"])
    if content["max_error"] is not None:
        text += f"\n\nLargest relative error against float64: {content['max_error']:.1e}."
    (out / "table.md").write_text(text + "\n", encoding="utf-8")
    picture = out / f"{study.name}.png"
    study.draw(picture, content["rows"])
    _say(f"\n{text}\n")
    for path in (out / "results.json", out / "table.md", picture):
        _say(f"wrote {path}")


def _say(line: str) -> None:
    print(line, flush=True)
