"""The results held against what the product was promised to cost."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

from experiments.benchmark.products.implementations import CURVLINOPS, FLOOR, GRADIENT, JAX, OURS
from experiments.benchmark.products.measuring import Row

Bar = dict[str, Any]
_OVER_FLOOR = {"toy784": 1.15, "toy2": 1.2, "toy784-wide": 1.05}
_OVER_JAX = dict.fromkeys(("seed", "toy784", "toy2", "conv", "transformer"), 1.0)
_CURVLINOPS_OVER = dict.fromkeys(("seed", "toy784", "toy2", "toy784-wide"), 7.0) | {"conv": 2.5, "transformer": 2.5}
_SETUP, _PEAK, _STEP_PEAK, _STEP = 0.5, 1.3, 2.0, 1.15


def judge(
    rows: Sequence[Row],
    step: dict[str, Any] | None,
    step_peaks: dict[str, dict[str, float]],
    step_setups: dict[str, float],
    limits: bool = True,
) -> list[Bar]:
    """Compute every bar that the rows allow.

    Args:
        rows: Of any models and implementations.
        step: What `step.measure` returned; None: not measured.
        step_peaks: What `step.peak_ratios` returned, by model.
        step_setups: What `step.setup_ratio` returned, by model.
        limits: Whether the workloads are those that the limits were set for.

    Returns:
        For each bar and model: what, value, limit, whether the value is to stay below it, and whether it does. A value
        that is not finite, or whose parts are missing, is left out.
    """
    found = {(row["model"], row["implementation"]): row for row in rows}
    models = list(dict.fromkeys(row["model"] for row in rows))

    def median(model: str, names: Iterable[str]) -> float:
        """Return the least median of these implementations; NaN where none was measured."""
        values = [found[model, name]["median_ms"] for name in names if (model, name) in found]
        return min(values, default=math.nan)

    bars = []
    for model in models:
        ours, row = median(model, [OURS]), found.get((model, OURS))
        gradient = median(model, [GRADIENT])
        bars.append(_bar("product / GEMM floor", model, ours / median(model, [FLOOR]), _OVER_FLOOR.get(model)))
        bars.append(_bar("product / best of JAX", model, ours / median(model, JAX), _OVER_JAX.get(model)))
        times = median(model, [CURVLINOPS]) / ours
        bars.append(_bar("curvlinops / product", model, times, _CURVLINOPS_OVER.get(model), below=False))
        bars.append(_bar("product / gradient", model, ours / gradient, None))
        if row is not None:
            bars.append(_bar("set-up by from_loss / gradient", model, row["setup_ms"] / gradient, None))
            peak = row["peak_ratio"]
            bars.append(_bar("peak memory of a product / gradient's", model, math.nan if peak is None else peak, _PEAK))
        if model in step_setups:
            bars.append(_bar("set-up of a step / gradient", model, step_setups[model], _SETUP))
        for name, ratio in step_peaks.get(model, {}).items():
            bars.append(_bar(f"peak memory of a step ({name}) / gradient's", model, ratio, _STEP_PEAK))
    if step is not None:
        bars.append(_bar("step / sum of its parts", step["model"], step["ratio"], _STEP))
    return [bar if limits else bar | {"limit": None, "met": None} for bar in bars if math.isfinite(bar["value"])]


def _bar(what: str, model: str, value: float, limit: float | None, below: bool = True) -> Bar:
    met = None if limit is None else bool(value <= limit if below else value >= limit)
    return {"bar": what, "model": model, "value": value, "limit": limit, "below": below, "met": met}
