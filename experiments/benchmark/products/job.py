"""The job `products` of scripts/benchmark.py: checked, measured model by model, saved after each, and shown."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.benchmark import store
from experiments.benchmark.products import figure, report, step, workloads
from experiments.benchmark.products.bars import judge
from experiments.benchmark.products.implementations import IMPLEMENTATIONS, OURS, Product
from experiments.benchmark.products.measuring import QUICK, Effort, Row, measure
from experiments.environment import UsageError, choose_device, describe, prepare_directory, require_extras
from experiments.timing import torch_threads

_STEPS = 20


@dataclass(frozen=True, kw_only=True)
class ProductsJob:
    """What the user asks for.

    Attributes:
        models: Names of workloads; None: all.
        implementations: Names; None: all. Ours is measured in any case.
        threads: Of torch, and of JAX.
        device: "auto" or a torch device.
        out: Directory for what is written; None: runs/products.
        quick: Small batches and a single round, which show that everything runs.
    """

    models: Sequence[str] | None = None
    implementations: Sequence[str] | None = None
    threads: int = 2
    device: str = "cpu"
    out: Path | None = None
    quick: bool = False

    def check(self) -> None:
        """Check what can be checked before anything is measured.

        Raises:
            UsageError: If something asked for is not possible.
        """
        if self.threads < 1:
            raise UsageError(f"--threads {self.threads} is none; give 1 or more")
        for name in self.models or ():
            if name not in workloads.NAMES:
                raise UsageError(f"--models {name!r} is unknown; choose from: {', '.join(workloads.NAMES)}")
        for name in self.implementations or ():
            if name not in IMPLEMENTATIONS:
                raise UsageError(f"--implementations {name!r} is unknown; choose from: {', '.join(IMPLEMENTATIONS)}")
        require_extras(["matplotlib"])


def run(job: ProductsJob) -> dict[str, Any]:
    """Measure, save and show.

    Args:
        job: What the user asks for.

    Returns:
        What results.json holds.

    Raises:
        UsageError: Before anything is measured, if something asked for is not possible.
    """
    job.check()
    device = choose_device(job.device)
    models: dict[str, workloads.Workload] = {}
    absent: dict[str, str] = {}
    for name in dict.fromkeys(job.models or workloads.NAMES):
        try:
            models[name] = workloads.make(name, device, job.quick)
        except UsageError as error:
            if job.models is not None:
                raise
            absent[name] = str(error)  # asked for everything that there is: said in the table
    kinds = [
        kind
        for name, kind in IMPLEMENTATIONS.items()
        if job.implementations is None or name in job.implementations or name == OURS
    ]
    out = prepare_directory(job.out if job.out is not None else Path("runs") / "products")
    _set_environment(job.threads)
    with torch_threads(job.threads):
        environment: dict[str, Any] = describe(device) | {"cores": os.cpu_count(), "quick": job.quick}
        return _measure(job, models, absent, kinds, out, environment)


def _set_environment(threads: int) -> None:
    # XLA's pools, which JAX computes with, read this when the first array is made
    os.environ["NPROC"] = str(threads)


def _measure(
    job: ProductsJob,
    models: dict[str, workloads.Workload],
    absent: dict[str, str],
    kinds: Sequence[type[Product]],
    out: Path,
    environment: dict[str, Any],
) -> dict[str, Any]:
    path = out / "results.json"
    titles = {name: workload.title for name, workload in models.items()} | {name: name for name in absent}
    rows: list[Row] = []
    content: dict[str, Any] = {"environment": environment | _versions(kinds), "models": titles, "rows": rows}
    content |= {"missing": [], "step": None, "bars": []}
    for name, reason in absent.items():
        content["missing"] += [{"model": name, "implementation": kind.name, "reason": reason} for kind in kinds]
    peaks: dict[str, dict[str, float]] = {}
    setups: dict[str, float] = {}
    memory = choose_device(job.device).type in {"cpu", "cuda"}
    for name, workload in models.items():
        print(f"{workload.title}: {len(kinds)} implementations, {job.threads} threads", flush=True)
        found, missing = measure(workload, kinds, QUICK if job.quick else Effort())
        rows += found
        content["missing"] += missing
        setups[name] = step.setup_ratio(workload, 1 if job.quick else _STEPS)
        if memory and not (job.quick and peaks):  # one model shows that it runs
            peaks[name] = step.peak_ratios(workload, 1 if job.quick else 2)
        store.write_json(path, content | {"bars": judge(rows, None, peaks, setups, not job.quick)})
    content["step"] = step.measure(step.make(job.quick, job.device), 1 if job.quick else _STEPS)
    content["bars"] = judge(rows, content["step"], peaks, setups, not job.quick)
    store.write_json(path, content)
    _show(out, path, content)
    return content


def _versions(kinds: Sequence[type[Product]]) -> dict[str, str]:
    """Name the versions of the libraries that were measured."""
    from importlib.metadata import version

    return {kind.requirement: version(kind.requirement) for kind in kinds if kind.requirement and kind.is_installed()}


def _show(out: Path, path: Path, content: dict[str, Any]) -> None:
    titles = content["models"]
    text = "\n\n".join([
        report.table(content["rows"], content["missing"], titles),
        report.bars_table(content["bars"], titles),
        report.step_line(content["step"]),
    ])
    (out / "table.md").write_text(text + "\n")
    figure.write(out / "products.png", content["rows"], content["missing"], titles)
    print(f"\n{text}\n")
    for one in (path, out / "table.md", out / "products.png"):
        print(f"wrote {one}", flush=True)
