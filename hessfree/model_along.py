"""The quadratic model of the loss along one step, as a few numbers."""

from __future__ import annotations

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class ModelAlong:
    """The quadratic model of the recorded loss along s, and the weight decay's exact quadratic.

    Attributes:
        slope: g_recᵀ s, with the gradient of the recorded loss alone.
        decay_slope: Slope of the weight decay along s.
        decay_bend: Its second derivative along s.
        norm: ‖s‖.
        metric: sᵀ M s, with M the metric in which the solver's direction is the steepest.
        bend: sᵀ G_rec s; None where no product was taken.
    """

    slope: float
    decay_slope: float
    decay_bend: float
    norm: float
    metric: float
    bend: float | None = None

    @property
    def finite(self) -> bool:
        """Whether every number that is known is finite."""
        return all(math.isfinite(t) for t in dataclasses.astuple(self) if t is not None)

    def scaled(self, factor: float) -> ModelAlong:
        """Return the model along `factor` times the step."""
        square = factor**2
        return ModelAlong(
            slope=factor * self.slope,
            decay_slope=factor * self.decay_slope,
            decay_bend=square * self.decay_bend,
            norm=factor * self.norm,
            metric=square * self.metric,
            bend=None if self.bend is None else square * self.bend,
        )

    def shortening(self, limit: float | None, norm: str, scale: float) -> float:
        """Return the factor that brings the step down to `limit`.

        Args:
            limit: The longest that it may be; None for any length.
            norm: How long it is: "euclidean", "curvature" or "preconditioner".
            scale: How many times the recorded loss's G the solver's matrix is.

        Returns:
            1 or less.
        """
        if limit is None:
            return 1.0
        length = self.norm
        if norm == "curvature":
            assert self.bend is not None
            length = math.sqrt(max(self.bend * scale, 0.0))
        elif norm == "preconditioner":
            length = math.sqrt(abs(self.metric))
        return limit / length if length > limit else 1.0

    def decay_change(self, alpha: float) -> float:
        """Return the exact change of the weight decay's ½‖θ‖² term at θ + α s."""
        return alpha * self.decay_slope + 0.5 * alpha**2 * self.decay_bend

    def predicted(self, alpha: float) -> float:
        """Return the predicted change of loss and weight decay at θ + α s; NaN where `bend` is not known."""
        bend = math.nan if self.bend is None else self.bend
        return alpha * self.slope + 0.5 * alpha**2 * bend + self.decay_change(alpha)
