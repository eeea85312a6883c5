"""What a benchmark says in a table."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from experiments.benchmark.measure import Row
from experiments.benchmark.suite import OURS, REFERENCE
from experiments.results import score_name


@dataclass(frozen=True)
class Summary:
    """One contender on one problem, over seeds.

    Attributes:
        problem: The problem.
        optimizer: The contender.
        finals: The final score of each seed; infinite where the run diverged.
        ratios: For each seed that the base ran too, its final score over that of the base: infinite where the run
            diverged itself, 0 where the base alone did.
        share: Median over seeds of the time to the reference's final score, as a share of the budget; infinite where
            it is not reached, NaN where the reference did not run, or diverged.
        steps: Median number of steps.
    """

    problem: str
    optimizer: str
    finals: tuple[float, ...]
    ratios: tuple[float, ...]
    share: float
    steps: float

    @property
    def median(self) -> float:
        """Median final score."""
        return statistics.median(self.finals)

    @property
    def ratio(self) -> float:
        """Median over seeds of the final score over that of the base; NaN where the base did not run."""
        return _median(self.ratios)


def summarize(rows: Sequence[Row], base: str = OURS) -> list[Summary]:
    """Take medians over seeds.

    Args:
        rows: Runs of any problems, contenders and seeds.
        base: Whose final score the others' are divided by, seed by seed.

    Returns:
        One summary a problem and contender, in the order in which they first appear.
    """
    finals = {(row["problem"], row["optimizer"], row["seed"]): _number(row["final"]) for row in rows}
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["problem"], row["optimizer"]), []).append(row)
    problems = list(dict.fromkeys(row["problem"] for row in rows))
    summaries = []
    for (problem, optimizer), runs in sorted(groups.items(), key=lambda item: problems.index(item[0][0])):
        # medians pair a run with the base of its own seed; seeds that only one of them has say nothing of a ratio
        ratios = [
            _over(_number(run["final"]), finals[problem, base, run["seed"]])
            for run in runs
            if finals.get((problem, base, run["seed"]), 0) > 0
        ]
        marked = [run for run in runs if finals.get((problem, REFERENCE, run["seed"]), math.inf) < math.inf]
        shares = [_number(run["seconds_to_adam_final"]) / run["budget_seconds"] for run in marked]
        summaries.append(
            Summary(
                problem,
                optimizer,
                tuple(_number(run["final"]) for run in runs),
                tuple(ratios),
                _median(shares),
                _median([run["steps"] for run in runs if run["steps"] is not None]),
            )
        )
    return summaries


def _number(value: float | None) -> float:
    """Read what JSON could not hold: diverged, or never reached."""
    return math.inf if value is None else value


def _over(final: float, base: float) -> float:
    """Divide, so that a run that diverged is never as good as another."""
    return math.inf if math.isinf(final) else final / base


def _median(values: Sequence[float]) -> float:
    return statistics.median(values) if values else math.nan


def table(rows: Sequence[Row]) -> str:
    """Arrange the comparison of optimizers for a README.

    Args:
        rows: The runs.

    Returns:
        A Markdown table: a line a problem and contender.
    """
    scores = {row["problem"]: row["score"] for row in rows}
    budgets = {row["problem"]: row["budget_seconds"] for row in rows}
    lines = [
        f"| problem | score, seconds | optimizer | final: median (range) | over {OURS}'s | share of the time to "
        f"{REFERENCE}'s final | steps |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    previous = None
    for one in summarize(rows):
        first = one.problem != previous
        previous = one.problem
        what = f"{score_name(scores[one.problem])}, {budgets[one.problem]:g}" if first else ""
        cells = [one.problem if first else "", what, one.optimizer, _spread(one), _ratio(one.ratio), _share(one.share)]
        lines.append(f"| {' | '.join(cells)} | {_count(one.steps)} |")
    return "\n".join(lines)


def ablation_table(rows: Sequence[Row], base: str) -> str:
    """Arrange an ablation: a line a variation, two columns a problem.

    Args:
        rows: The runs; "optimizer" is the variation.
        base: The variation that the others are compared with.

    Returns:
        A Markdown table: final score, and its ratio to that of `base`, as medians over seeds.
    """
    known = {(one.problem, one.optimizer): one for one in summarize(rows, base)}
    problems = list(dict.fromkeys(row["problem"] for row in rows))
    lines = [
        "| variation | " + " | ".join(f"{problem} | over {base}'s" for problem in problems) + " |",
        "| --- " * (1 + 2 * len(problems)) + "|",
    ]
    for variation in dict.fromkeys(row["optimizer"] for row in rows):
        cells = [variation]
        for problem in problems:
            one = known.get((problem, variation))
            cells += ["", ""] if one is None else [_spread(one), _ratio(one.ratio)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _spread(one: Summary) -> str:
    """Write a median with its range."""
    if not math.isfinite(one.median):
        return "diverged"
    if len(one.finals) == 1:
        return f"{one.median:.4g}"
    high = "diverged" if math.isinf(max(one.finals)) else f"{max(one.finals):.4g}"
    return f"{one.median:.4g} ({min(one.finals):.4g} - {high})"


def _ratio(ratio: float) -> str:
    return "-" if math.isnan(ratio) else "inf" if math.isinf(ratio) else f"{ratio:.3g}"


def _share(share: float) -> str:
    return "-" if math.isnan(share) else "never" if math.isinf(share) else f"{share:.2f}"


def _count(steps: float) -> str:
    return "-" if math.isnan(steps) else f"{steps:.0f}"
