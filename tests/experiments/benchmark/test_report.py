import math
from pathlib import Path

import pytest

from experiments.benchmark import figures
from experiments.benchmark.overview import overview
from experiments.benchmark.report import ablation_table, summarize, table
from experiments.benchmark.store import merge
from tests.experiments.benchmark.rows import row

ROWS = merge(
    [],
    [
        row("moons", "hessfree", 0, [8.0, 2.0, 1.0, 1.0]),
        row("moons", "hessfree", 1, [8.0, 4.0, 4.0, 2.0]),
        row("moons", "hessfree", 2, [8.0, 4.0, 3.0, 3.0]),
        row("moons", "adam", 0, [8.0, 6.0, 5.0, 4.0]),
        row("moons", "adam", 1, [8.0, 6.0, 5.0, 4.0]),
        row("moons", "adam", 2, [8.0, 6.0, 5.0, 3.0]),
        row("moons", "soap", 0, [8.0, None], steps=None, budget_seconds=4.0),
        row("digits", "hessfree", 0, [8.0, 2.0]),
    ],
)
SIGNATURE = b"\x89PNG\r\n\x1a\n"


def test_medians_pair_seeds() -> None:
    ours, adam, soap, alone = summarize(ROWS)
    assert ours.finals == (1.0, 2.0, 3.0) and ours.median == 2.0 and ours.ratio == 1.0
    # Seed by seed the ratios are 4, 2 and 1.
    assert adam.ratio == 2.0 and adam.share == 1.0
    assert ours.share == pytest.approx(0.5)  # 1.5, 2 and 3 of 4 seconds
    assert soap.finals == (math.inf,) and soap.share == math.inf and soap.ratio == math.inf
    assert math.isnan(soap.steps)
    assert alone.problem == "digits" and math.isnan(alone.share) and alone.ratio == 1.0


def test_the_table() -> None:
    lines = table(ROWS).splitlines()
    assert lines[2] == "| moons | excess loss, 4 | hessfree | 2 (1 - 3) | 1 | 0.50 | 40 |"
    assert lines[3] == "|  |  | adam | 4 (3 - 4) | 2 | 1.00 | 40 |"
    assert lines[4] == "|  |  | soap | diverged | inf | never | - |"
    assert lines[5] == "| digits | excess loss, 2 | hessfree | 2 | 1 | - | 20 |"
    assert len({line.count("|") for line in lines}) == 1


def test_our_divergence_is_seen() -> None:
    rows = [row("moons", name, seed, [8.0, 1.0]) for name in ("hessfree", "adam") for seed in (0, 1)]
    rows += [row("moons", "hessfree", 2, [8.0, None]), row("moons", "adam", 2, [8.0, 3.0])]
    ours, adam = summarize(merge([], rows))
    assert ours.ratios == (1.0, 1.0, math.inf) and adam.ratios == (1.0, 1.0, 0.0)
    rows += [row("moons", "hessfree", seed, [8.0, None]) for seed in (0, 1)]
    ours, adam = summarize(merge([], rows))
    assert ours.ratio == math.inf and adam.ratio == 0.0
    assert "| hessfree | diverged | inf |" in table(merge([], rows))


def test_where_the_reference_diverged_there_is_no_mark_to_reach() -> None:
    rows = [row("moons", "hessfree", 0, [8.0, 1.0]), row("moons", "adam", 0, [8.0, None])]
    assert all(math.isnan(one.share) for one in summarize(merge([], rows)))


def test_the_overview() -> None:
    rows = [row("moons", "hessfree", 0, [8.0, 2.0]), row("moons", "adam", 0, [8.0, 1.0])]
    rows += [row("digits", "hessfree", seed, [8.0, 0.64 / (1 + seed)]) for seed in (0, 1, 2)]
    rows += [row("digits", name, seed, [8.0, 6.4]) for name in ("adam", "muon") for seed in (0, 1, 2)]
    rows += [row("digits", "soap", 0, [8.0, None])]
    first, second = overview(merge([], rows)).split("\n\n")
    assert first.splitlines()[2:] == [
        "| digits (excess loss, 2 s) | **0.320** | 6.4 (20x, 10-30) | diverged | - | 0.53 |",
        "| moons (excess loss, 2 s) | 2 | **1.000** (0.50x) | - | - | never |",
    ]
    assert second.splitlines() == [
        "| final score over hessfree's | digits |",
        "| --- | --- |",
        "| Adam | 20x, 10-30 |",
        "| SOAP | diverged |",
        "| Muon | 20x, 10-30 |",
    ]


def test_the_table_of_an_ablation() -> None:
    rows = merge(
        [],
        [
            row("moons", "default", 0, [1.0]),
            row("moons", "no momentum", 0, [3.0]),
            row("digits", "default", 0, [2.0]),
        ],
    )
    assert ablation_table(rows, "default").splitlines() == [
        "| variation | moons | over default's | digits | over default's |",
        "| --- | --- | --- | --- | --- |",
        "| default | 1 | 1 | 2 | 1 |",
        "| no momentum | 3 | 3 |  |  |",
    ]


def test_the_median_of_curves() -> None:
    curves = [[(1.0, y), (4.0, y / 16)] for y in (1.0, 2.0, 100.0)]
    median = figures.median_curve([*curves[:2], [(0.5, 100.0), *curves[2][1:], (8.0, 1.0)]])
    assert median[0] == pytest.approx((1.0, 2.0)) and median[-1] == pytest.approx((4.0, 2.0 / 16))
    # a power law is a straight line on these axes, and stays one
    assert all(height == pytest.approx(2.0 / time**2) for time, height in median)
    assert figures.median_curve([]) == [] and figures.median_curve([[(1.0, 1.0)]]) == []


def test_the_figure_where_ours_diverged(tmp_path: Path) -> None:
    rows = merge([], [row("moons", "hessfree", 0, [8.0, None]), row("moons", "adam", 0, [8.0, 3.0])])
    both = merge([], [row("moons", "hessfree", 0, [8.0, None]), row("moons", "adam", 0, [8.0, None])])
    one, other = (figures.write_summary(tmp_path / f"{k}.png", r).read_bytes() for k, r in enumerate((rows, both)))
    assert one.startswith(SIGNATURE) and one != other


def test_figures(tmp_path: Path) -> None:
    curves = figures.write_curves(tmp_path / "curves.png", [one for one in ROWS if one["problem"] == "moons"])
    assert curves.read_bytes().startswith(SIGNATURE)
    nothing = merge([], [row("moons", "adam", 0, [8.0, None])])
    assert figures.write_curves(tmp_path / "nothing.png", nothing).read_bytes().startswith(SIGNATURE)
    assert figures.write_summary(tmp_path / "summary.png", ROWS).read_bytes().startswith(SIGNATURE)
    assert figures.write_summary(tmp_path / "empty.png", nothing).read_bytes().startswith(SIGNATURE)
