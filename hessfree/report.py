"""What one optimizer step did, as a frozen record of plain numbers and words."""

from __future__ import annotations

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class StepReport:
    """Everything that one `HessianFree.step` did.

    Losses are of the recorded loss: the one whose `backward` the closure called, in its own scale.
    Numbers that a step did not need to compute are NaN (for example `loss_after` where neither the
    damping rule nor the line search evaluated the loss again).

    Attributes:
        step: Number of this step, from 1.
        accepted: Whether the parameters moved.
        status: In words: what happened, and why where the step was rejected.
        loss: Recorded loss before the step.
        loss_after: Recorded loss after the step, on the same batch and random numbers.
        predicted_change: Change of the recorded loss that the quadratic model predicts.
        reduction_ratio: Actual over predicted change of the loss (Martens 2010, sec. 4.1).
        damping: lambda of the first parameter group that this step solved with.
        next_damping: lambda that the next step will use.
        gradient_norm: Euclidean norm of gradient plus weight decay, at this step alone.
        step_norm: Euclidean norm of the change of the parameters (0 where rejected).
        step_length: Factor that the line search chose (times lr gives the change).
        iterations: Iterations of the solver.
        residual: Final relative residual ‖b − Ax‖/‖b‖ of the solver; NaN where it took no product.
        residuals: The relative residual before the first and after each iteration; empty likewise.
        solver_status: In words: why the solver stopped.
        backend: Which linearisation made the products; "none" where the step needed no curvature.
        cut: In words: where the network ends and the loss begins.
        preconditioner: In words: what preconditioned the solver.
        curvature_samples: Samples in the curvature batch (0 where the outputs have no batch dimension).
        evaluations: Times the closure was replayed.
        seconds_gradient: Seconds in the closure's forward and backward.
        seconds_setup: Seconds to find the cut, linearise and update the preconditioner.
        seconds_solve: Seconds in the solver and the momentum model.
        seconds_evaluate: Seconds in replays of the closure.
    """

    step: int
    accepted: bool
    status: str
    loss: float
    loss_after: float = math.nan
    predicted_change: float = math.nan
    reduction_ratio: float = math.nan
    damping: float = math.nan
    next_damping: float = math.nan
    gradient_norm: float = math.nan
    step_norm: float = 0.0
    step_length: float = 0.0
    iterations: int = 0
    residual: float = math.nan
    residuals: tuple[float, ...] = ()
    solver_status: str = "not run"
    backend: str = "none"
    cut: str = "none"
    preconditioner: str = "none"
    curvature_samples: int = 0
    evaluations: int = 0
    seconds_gradient: float = 0.0
    seconds_setup: float = 0.0
    seconds_solve: float = 0.0
    seconds_evaluate: float = 0.0

    def __str__(self) -> str:
        """Return the step as one readable line."""
        after = "" if math.isnan(self.loss_after) else f" -> {self.loss_after:.4g}"
        rho = "" if math.isnan(self.reduction_ratio) else f" (rho {self.reduction_ratio:.2f})"
        parts = [f"step {self.step}: loss {self.loss:.4g}{after}{rho}, {self.status}"]
        if self.iterations or not math.isnan(self.residual):
            plural = "" if self.iterations == 1 else "s"
            parts.append(f"{self.iterations} iteration{plural} to residual {self.residual:.2g}: {self.solver_status}")
        elif self.solver_status != "not run":
            parts.append(self.solver_status)
        changed = "" if f"{self.next_damping:.2g}" == f"{self.damping:.2g}" else f" -> {self.next_damping:.2g}"
        parts.append(f"lambda {self.damping:.2g}{changed}, |step| {self.step_norm:.2g}")
        if self.backend != "none":
            parts.append(f"cut: {self.cut} ({self.backend})")
        parts.append(f"{1e3 * self.seconds:.1f} ms")
        return " ".join("; ".join(parts).split())

    @property
    def seconds(self) -> float:
        """Seconds of the whole step."""
        return self.seconds_gradient + self.seconds_setup + self.seconds_solve + self.seconds_evaluate

    def scalars(self, prefix: str = "") -> dict[str, float]:
        """Return every number by name, for a logger.

        Args:
            prefix: Put before each name, for example `"hessfree/"`.

        Returns:
            Name to float; booleans as 0 or 1, words and the list of residuals left out, NaN where a
            number was not needed at this step.
        """
        out = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool | int | float):
                out[prefix + field.name] = float(value)
        out[prefix + "seconds"] = self.seconds
        return out
