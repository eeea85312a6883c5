"""The benchmark at a glance: a line a problem for the rivals that ran on all of them, and a line a contender."""

import math
from collections.abc import Sequence

from experiments.benchmark.measure import Row
from experiments.benchmark.report import Summary, summarize
from experiments.benchmark.suite import EXTENDED, OURS, REFERENCE
from experiments.results import score_name

_RIVALS = (REFERENCE, "soap", "lbfgs")
_NAMES = {
    "adam": "Adam",
    "adamw": "AdamW",
    "soap": "SOAP",
    "lbfgs": "L-BFGS",
    "kfac": "K-FAC^-½ alone, no CG",
    "muon": "Muon",
    "sgd": "SGD",
    "shampoo": "Shampoo",
    "gram": "Gram (dual) solver",
    "dense-fisher": "dense Fisher",
}

Known = dict[str, dict[str, Summary]]  # by problem, by contender


def overview(rows: Sequence[Row]) -> str:
    """Arrange a comparison as a reader wants it first.

    Args:
        rows: The runs.

    Returns:
        Two Markdown tables. The first has a line a problem, from where ours gains most on the reference: median final
        scores (smallest in bold), for the rivals the ratio to ours, as the median and the range over seeds, and the
        share of the time to the reference's final score. The second has a line a contender: the same ratios on the
        problems where all contenders run.
    """
    known: Known = {}
    for one in summarize(rows):
        known.setdefault(one.problem, {})[one.optimizer] = one
    tables = [_by_problem(known, rows)]
    if any(problem in known for problem in EXTENDED):
        tables.append(_by_contender(known))
    return "\n\n".join(tables)


def _by_problem(known: Known, rows: Sequence[Row]) -> str:
    what = {row["problem"]: f"{score_name(row['score'])}, {row['budget_seconds']:g} s" for row in rows}
    names = " | ".join(_NAMES[name] for name in _RIVALS)
    lines = [
        f"| problem | {OURS} | {names} | share of the time to {_NAMES[REFERENCE]}'s final |",
        "| --- " * (3 + len(_RIVALS)) + "|",
    ]
    for problem in sorted(known, key=lambda problem: _gain(known[problem]), reverse=True):
        of_one = known[problem]
        shown = [of_one[name] for name in (OURS, *_RIVALS) if name in of_one]
        best = min((one.median for one in shown), default=math.nan)
        cells = [_cell(of_one.get(name), best) for name in (OURS, *_RIVALS)]
        share = _share(of_one.get(OURS))
        lines.append(f"| {problem} ({what[problem]}) | {' | '.join(cells)} | {share} |")
    return "\n".join(lines)


def _by_contender(known: Known) -> str:
    problems = [problem for problem in EXTENDED if problem in known]
    lines = [f"| final score over {OURS}'s | {' | '.join(problems)} |", "| --- " * (1 + len(problems)) + "|"]
    for name, words in _NAMES.items():
        ones = [known[problem].get(name) for problem in problems]
        if any(ones):
            lines.append(f"| {words} | {' | '.join('-' if one is None else ratios(one) for one in ones)} |")
    return "\n".join(lines)


def _gain(of_one: dict[str, Summary]) -> float:
    """The reference's ratio; problems without one come last."""
    ratio = of_one[REFERENCE].ratio if REFERENCE in of_one else math.nan
    return -math.inf if math.isnan(ratio) else ratio


def _cell(one: Summary | None, best: float) -> str:
    if one is None:
        return "-"
    if math.isinf(one.median):
        return "diverged"
    final = f"**{_number(one.median)}**" if one.median == best else _number(one.median)
    return final if one.optimizer == OURS else f"{final} ({ratios(one)})"


def ratios(one: Summary) -> str:
    """Write a median ratio with its range over seeds.

    Args:
        one: A contender on a problem.

    Returns:
        "2.9x, 2.3-3.1"; the ratio alone where there is one seed, "-" where ours did not run.
    """
    if not one.ratios:
        return "-"
    if math.isinf(one.ratio):
        return "diverged"
    if len(one.ratios) == 1:
        return f"{_ratio(one.ratio)}x"
    return f"{_ratio(one.ratio)}x, {_ratio(min(one.ratios))}-{_ratio(max(one.ratios))}"


def _ratio(ratio: float) -> str:
    if math.isinf(ratio):
        return "diverged"
    return f"{ratio:.2f}" if ratio < 1.995 else f"{ratio:.1f}" if ratio < 9.95 else f"{ratio:.0f}"


def _number(value: float) -> str:
    """Three digits, and where losses are near one the third behind the point, for they differ there."""
    if value < 1e-3:
        return f"{value:.1e}".replace("e-0", "e-")
    return f"{value:.3f}" if 0.1 <= value < 2 else f"{value:.3g}" if value >= 2 else f"{value:#.2g}"


def _share(one: Summary | None) -> str:
    if one is None or math.isnan(one.share):
        return "-"
    return "never" if math.isinf(one.share) else f"{one.share:.2f}"
