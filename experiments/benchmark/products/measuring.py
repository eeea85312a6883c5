"""Times, errors and memory of the products on one workload."""

import contextlib
import functools
import math
import statistics
import time
import warnings
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from experiments.benchmark.memory import peak_bytes
from experiments.benchmark.products.implementations import GRADIENT, OURS, Product, UnsupportedError
from experiments.benchmark.products.workloads import Workload
from experiments.environment import UsageError, synchronize
from experiments.timing import few_objects, quartiles, rotated, seconds, without_collector
from hessfree import GaussNewton

Row = dict[str, Any]
SOLVES = (1, 3, 10, 50)  # products a step, for which totals are given


@dataclass(frozen=True)
class Effort:
    """How long is measured.

    Attributes:
        rounds: Turns of each implementation; in a round each has one, on the same new parameters.
        least_rounds: Turns that even the slowest gets.
        turn_products: Least number of products a turn, besides the one right after the set-up.
        turn_seconds: A turn goes on until its products took this long.
        seconds: No further turn (but the least) for who has used this much.
        vectors: Products that are compared with float64.
    """

    rounds: int = 9
    least_rounds: int = 3
    turn_products: int = 3
    turn_seconds: float = 0.1
    seconds: float = 3.0
    vectors: int = 3

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            ValueError: If nothing would be measured.
        """
        if min(self.rounds, self.least_rounds, self.turn_products, self.vectors) < 1:
            raise ValueError(f"{self} measures nothing: give every number 1 or more")


QUICK = Effort(rounds=1, least_rounds=1, turn_products=1, turn_seconds=0.0, vectors=1)


@dataclass
class _Entry:
    """One implementation on the workload.

    Attributes:
        first: Seconds of everything up to the first product, which traces or compiles.
        error: Largest relative error.
        products: Seconds of each.
        starts: Seconds of each set-up together with the product that follows it.
        spent: Seconds of all turns.
    """

    implementation: Product
    first: float
    error: float
    products: list[float] = field(default_factory=list)
    starts: list[float] = field(default_factory=list)
    spent: float = 0.0


def measure(
    workload: Workload, kinds: Sequence[type[Product]], effort: Effort, seed: int = 0
) -> tuple[list[Row], list[Row]]:
    """Measure implementations against each other, in turns.

    Attention runs in its plain form throughout, which forward differentiation and double backward need.

    Args:
        workload: What to multiply by. Its parameters move, as they do from step to step.
        kinds: The implementations; ours among them.
        effort: How long.
        seed: Of the vectors and of the moves.

    Returns:
        Rows of what was measured; and of what is missing, each with its reason.

    Raises:
        UsageError: If ours cannot be measured: it is what all are compared with.
    """
    generator = torch.Generator().manual_seed(seed)
    with sdpa_kernel(SDPBackend.MATH), _without_advice():
        vectors = [workload.vector(generator) for _ in range(effort.vectors)]
        entries, missing = _begin_all(kinds, workload, vectors)
        if OURS not in {entry.implementation.name for entry in entries}:
            reasons = [row["reason"] for row in missing if row["implementation"] == OURS] or ["not asked for"]
            raise UsageError(f"{OURS} cannot be measured on {workload.name}: {reasons[0]}")
        with few_objects():
            for index in range(effort.rounds):
                _round(workload, entries, effort, index, generator)
            details = {entry.implementation.name: entry.implementation.detail for entry in entries}
            peaks = {entry.implementation.name: _peak(entry.implementation, generator) for entry in entries}
    rows = [_row(entry, entries, peaks) | {"detail": details[entry.implementation.name]} for entry in entries]
    return rows, missing


class Truth:
    """What implementations are held against: the same in float64 on the CPU, at the parameters of now."""

    def __init__(self, workload: Workload, vectors: Sequence[Tensor]) -> None:
        """Compute the products with the live graph's back end.

        Args:
            workload: In any precision.
            vectors: `[P]` each.
        """
        self._double = workload.double()
        self._vectors = [v.cpu().double() for v in vectors]
        one = self._double
        operator = GaussNewton.from_loss(one.model, one.loss, one.inputs, one.targets, linearization="graph")
        self._products = [operator @ v for v in self._vectors]

    def error(self, kind: type[Product], found: Sequence[Tensor]) -> float:
        """Return the largest relative error, in the Euclidean norm, of what an implementation found.

        Args:
            kind: Which; one that is no product is compared with itself in float64.
            found: Its answers `[P]` for the vectors.

        Returns:
            The error; NaN where an answer is not finite.
        """
        wanted = self._products
        if not kind.is_product:
            exact = kind(self._double)
            exact.setup()
            wanted = [exact.decode(exact.product(exact.encode(v))).clone() for v in self._vectors]
        errors = [
            float((one.detach().cpu().double() - true).norm() / true.norm())
            for one, true in zip(found, wanted, strict=True)
        ]
        return math.nan if any(math.isnan(error) for error in errors) else max(errors)


def _begin_all(
    kinds: Sequence[type[Product]], workload: Workload, vectors: Sequence[Tensor]
) -> tuple[list[_Entry], list[Row]]:
    """Make a first product with each, and say why where there is none."""
    truth = Truth(workload, vectors)
    entries: list[_Entry] = []
    missing: list[Row] = []
    for kind in kinds:
        reason = f"absent: pip install {kind.requirement}"
        if kind.is_installed():
            try:
                entries.append(_begin(kind, workload, vectors, truth))
                continue
            except UnsupportedError as error:
                reason = str(error)
            except Exception as error:  # of any library: one that fails is a finding, not the end of the run
                reason = f"fails: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        missing.append({"model": workload.name, "implementation": kind.name, "reason": reason})
    return entries, missing


def _begin(kind: type[Product], workload: Workload, vectors: Sequence[Tensor], truth: Truth) -> _Entry:
    start = time.perf_counter()
    implementation = kind(workload)
    found = [implementation.decode(implementation.start(implementation.encode(vectors[0]))).clone()]
    synchronize(workload.device)
    first = time.perf_counter() - start
    found += [implementation.decode(implementation.product(implementation.encode(v))).clone() for v in vectors[1:]]
    return _Entry(implementation, first, truth.error(kind, found))


def _round(
    workload: Workload, entries: Sequence[_Entry], effort: Effort, index: int, generator: torch.Generator
) -> None:
    workload.move(generator)
    for entry in rotated(entries, index):
        if index < effort.least_rounds or entry.spent < effort.seconds:
            with without_collector():
                _turn(workload, entry, effort, generator)


def _turn(workload: Workload, entry: _Entry, effort: Effort, generator: torch.Generator) -> None:
    one, device = entry.implementation, workload.device
    one.refresh()
    entry.starts.append(seconds(functools.partial(one.start, one.encode(workload.vector(generator))), device))
    taken: list[float] = []
    while len(taken) < effort.turn_products or sum(taken) < effort.turn_seconds:
        taken.append(seconds(functools.partial(one.product, one.encode(workload.vector(generator))), device))
    entry.products += taken
    entry.spent += entry.starts[-1] + sum(taken)


def _peak(one: Product, generator: torch.Generator) -> int | None:
    """Give the most bytes held during a set-up and a product, what the set-up keeps included."""
    if not one.counts_memory or one.workload.device.type not in {"cpu", "cuda"}:
        return None
    v = one.encode(one.workload.vector(generator))
    one.kept = None
    peak = peak_bytes(lambda: one.start(v), one.workload.device)
    one.kept = None
    return peak


def _row(entry: _Entry, entries: Sequence[_Entry], peaks: dict[str, int | None]) -> Row:
    named = {other.implementation.name: other for other in entries}
    median = statistics.median(entry.products)
    starts = [max(0.0, start - median) for start in entry.starts]
    setup = statistics.median(starts)
    peak, unit = peaks[entry.implementation.name], peaks.get(GRADIENT)
    return {
        "model": entry.implementation.workload.name,
        "implementation": entry.implementation.name,
        "median_ms": 1e3 * median,
        "quartiles_ms": [1e3 * one for one in quartiles(entry.products)],
        "ratio_to_ours": median / statistics.median(named[OURS].products),
        "error": entry.error if math.isfinite(entry.error) else None,
        "setup_ms": 1e3 * setup,
        "setup_quartiles_ms": [1e3 * one for one in quartiles(starts)],
        "first_ms": 1e3 * entry.first,
        "totals_ms": {str(k): 1e3 * (setup + k * median) for k in SOLVES},
        "peak_bytes": peak,
        "peak_ratio": peak / unit if peak is not None and unit else None,
        "products": len(entry.products),
        "setups": len(entry.starts),
        "is_product": entry.implementation.is_product,
    }


@contextlib.contextmanager
def _without_advice() -> Generator[None]:
    """Silence what libraries say of their own code: deprecated torch.jit, hooks and conversions."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", UserWarning)
        yield
