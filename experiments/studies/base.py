"""What the studies share: forms of a computation, measured against each other and float64, with a memory guard."""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.benchmark.memory import peak_bytes
from experiments.studies.room import in_words
from experiments.timing import few_objects, quartiles, rotated, seconds, without_collector

_PATIENCE = 10.0  # seconds; a form whose first call took longer is not called again
Row = dict[str, Any]  # plain numbers and strings, as results.json has it
Answer = Tensor | Sequence[Tensor]


class UnavailableError(Exception):
    """What `Form.prepare` raises where the form does not exist here: a missing library, an operator without a rule."""


@dataclass(frozen=True)
class Effort:
    """How long is measured.

    Attributes:
        rounds: Turns of each form.
        turn_seconds: A turn repeats the call until it took this long.
        seconds: No further turn, after the first one, for a form that has used this much.
    """

    rounds: int = 9
    turn_seconds: float = 0.05
    seconds: float = 2.0

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            ValueError: If nothing would be measured.
        """
        if self.rounds < 1 or not self.seconds > 0 or not self.turn_seconds >= 0:
            raise ValueError(f"{self} measures nothing: give one round or more, and some seconds")


QUICK = Effort(rounds=3, turn_seconds=0.01, seconds=0.3)


@dataclass(frozen=True)
class Form:
    """One way to compute the answer.

    Attributes:
        name: Of the way, the same at every size.
        prepare: Does what is off the clock and returns the call that is on it, which returns the answer.
        needed: Bytes that it holds at least, where that may be too much; 0: certainly fits.
        counts_memory: Whether the peak of a call is measured; counting thousands of small operations takes minutes.
    """

    name: str
    prepare: Callable[[], Callable[[], Answer]]
    needed: int = 0
    counts_memory: bool = True

    @classmethod
    def of(cls, name: str, call: Callable[[], Answer], needed: int = 0, counts_memory: bool = True) -> "Form":
        """Return a form that has nothing to prepare."""
        return cls(name, lambda: call, needed, counts_memory)


@dataclass
class _Entry:
    """A form with what was found of it."""

    form: Form
    call: Callable[[], Answer]
    first: float
    error: float | None
    times: list[float] = field(default_factory=list)
    spent: float = 0.0


@dataclass(frozen=True)
class Scope:
    """Where and how thoroughly a study measures.

    Attributes:
        device: Where.
        room: Bytes that one form may need.
        quick: Small sizes, which show that everything runs.
        seed: Of every tensor.
        say: Receives a line about each comparison.
    """

    device: torch.device
    room: int
    quick: bool = False
    seed: int = 0
    say: Callable[[str], None] = print

    @property
    def effort(self) -> Effort:
        """How long is measured."""
        return QUICK if self.quick else Effort()

    def generator(self) -> torch.Generator:
        """Return a new generator on the CPU, from which every device gets the same numbers."""
        return torch.Generator().manual_seed(self.seed)

    def randn(self, generator: torch.Generator, *shape: int) -> Tensor:
        """Draw standard normal numbers, float32, on the device."""
        return torch.randn(shape, generator=generator).to(self.device)

    def compare(
        self,
        labels: Row,
        forms: Sequence[Form],
        truth: Callable[[], Answer] | None = None,
        *,
        unit: str | None = None,
        bound: float = 1e-3,
        compared: Callable[[Answer], Answer] = lambda answer: answer,
    ) -> list[Row]:
        """Measure forms of one computation, in turns.

        Args:
            labels: What identifies the comparison (sizes, ...); every row begins with it.
            forms: The ways to compute the answer.
            truth: Computes it in float64, on the CPU; None: no errors are measured.
            unit: Name of the form over whose median the others' medians are given as `ratio`.
            bound: What no relative error may exceed; an error that has to be shown needs its own key in a row.
            compared: Takes from a form's answer what `truth` gives, where all of it would not fit twice in float64.

        Returns:
            A row a form: `form`, `device`, `median_ms`, `quartiles_ms`, `calls`, `first_ms`, `ratio`, `error` (largest
            relative error of a tensor of the answer, Frobenius norm), `peak_bytes` (of one call, above what was held
            before; None on MPS), `needed_bytes`, `reason`. What could not be measured is None, and `reason` says why.

        Raises:
            ArithmeticError: If a form is wrong: its error exceeds `bound`, or its answer is not finite.
        """
        exact = None if truth is None else truth()
        entries: list[_Entry] = []
        missing: dict[str, str] = {}
        for form in forms:
            begun = self._begin(form, lambda answer: None if exact is None else relative_error(compared(answer), exact))
            if isinstance(begun, str):
                missing[form.name] = begun
                continue
            if begun.error is not None and not begun.error <= bound:
                raise ArithmeticError(
                    f"{form.name} at {labels} is wrong: relative error {begun.error:.2g}, at most {bound:g}"
                )
            entries.append(begun)
        self._time(entries)
        named = {entry.form.name: entry for entry in entries}
        base = statistics.median(named[unit].times) if unit in named else math.nan
        rows = []
        for form in forms:
            found = self._found(named[form.name], base) if form.name in named else dict.fromkeys(_FOUND)
            reason = missing.get(form.name)
            head = labels | {"form": form.name, "device": str(self.device)}
            rows.append(head | found | {"needed_bytes": form.needed or None, "reason": reason})
        self._announce(labels, rows)
        return rows

    def _begin(self, form: Form, error_of: Callable[[Answer], float | None]) -> _Entry | str:
        """Make the first call, or say why there is none."""
        if form.needed > self.room:
            return f"does not fit: {in_words(form.needed)} needed, {in_words(self.room)} allowed"
        found: list[Answer] = []
        try:
            call = form.prepare()
            first = seconds(lambda: found.append(call()), self.device)
        except UnavailableError as reason:
            return str(reason)
        except RuntimeError as failure:
            if isinstance(failure, torch.OutOfMemoryError) or "can't allocate memory" in str(failure):
                return "does not fit: out of memory"
            raise
        return _Entry(form, call, first, error_of(found[0]))

    def _time(self, entries: Sequence[_Entry]) -> None:
        effort = self.effort
        for entry in entries:
            if entry.first >= _PATIENCE:  # what such a call warms up is a small part of it
                entry.times, entry.spent = [entry.first], entry.first
        with few_objects():
            for index in range(effort.rounds if entries else 0):
                for entry in rotated(entries, index):
                    if entry.spent >= effort.seconds and entry.times:
                        continue
                    with without_collector():
                        taken = [seconds(entry.call, self.device)]
                        while sum(taken) < effort.turn_seconds:
                            taken.append(seconds(entry.call, self.device))
                    entry.times += taken
                    entry.spent += sum(taken)

    def _found(self, entry: _Entry, base: float) -> Row:
        median = statistics.median(entry.times)
        counts = entry.form.counts_memory and self.device.type in {"cpu", "cuda"} and entry.first < _PATIENCE
        return {
            "median_ms": 1e3 * median,
            "quartiles_ms": [1e3 * one for one in quartiles(entry.times)],
            "calls": len(entry.times),
            "first_ms": 1e3 * entry.first,
            "ratio": median / base if base > 0 else None,
            "error": entry.error,
            "peak_bytes": peak_bytes(entry.call, self.device) if counts else None,
        }

    def _announce(self, labels: Row, rows: Sequence[Row]) -> None:
        sizes = ", ".join(f"{name} {value}" for name, value in labels.items())
        parts = [
            f"{row['form']}: {row['reason']}" if row["reason"] else f"{row['form']} {row['median_ms']:.3g} ms"
            for row in rows
        ]
        self.say(f"{sizes}: {'; '.join(parts)}")


_FOUND = ("median_ms", "quartiles_ms", "calls", "first_ms", "ratio", "error", "peak_bytes")


def relative_error(found: Answer, true: Answer) -> float:
    """Return the largest relative error of a tensor of an answer, in the Frobenius norm.

    Args:
        found: On any device, in any precision.
        true: The same shapes; in float64 on the CPU. Where it is zero, the error is absolute.

    Returns:
        The error; infinite where `found` is not finite.

    Raises:
        ValueError: If shapes differ, which broadcasting would hide.
    """
    ours, theirs = _tensors(found), _tensors(true)
    if [one.shape for one in ours] != [one.shape for one in theirs]:
        raise ValueError(
            f"shapes {[list(one.shape) for one in ours]} were found, {[list(one.shape) for one in theirs]} are true"
        )
    errors = []
    for one, exact in zip(ours, theirs, strict=True):
        difference = float((one.detach().cpu().double() - exact.detach().cpu().double()).norm())
        scale = float(exact.detach().cpu().double().norm())
        errors.append(difference / scale if scale > 0 else difference)
    return max(error if math.isfinite(error) else math.inf for error in errors)


def _tensors(answer: Answer) -> list[Tensor]:
    return [answer] if isinstance(answer, Tensor) else list(answer)


@dataclass(frozen=True)
class Study:
    """One question with its measurements.

    Attributes:
        name: On the command line.
        question: One line.
        parts: By name, functions that measure and return rows.
        table: Arranges rows, of all parts or of some, as Markdown.
        draw: Draws rows, of all parts or of some, into a PNG.
        extras: Import names of the optional packages it needs, besides matplotlib.
    """

    name: str
    question: str
    parts: Mapping[str, Callable[[Scope], Iterable[Row]]]
    table: Callable[[Sequence[Row]], str]
    draw: Callable[[Path, Sequence[Row]], None]
    extras: Sequence[str] = ()

    def __post_init__(self) -> None:
        """Check that there is something to measure.

        Raises:
            ValueError: If there are no parts.
        """
        if not self.parts:
            raise ValueError(f"study {self.name!r} has no parts: give one or more")
