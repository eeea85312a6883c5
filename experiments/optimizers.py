"""The optimizers that are compared: their settings, defaults by data, and how each is built.

Every optimizer takes the standard closure, so one training loop serves all. A new one is one dataclass and one line in
`OPTIMIZERS`. Packages are imported when an optimizer is built, so that their import counts as its own time.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, Self, get_type_hints

import torch
from torch import nn
from torch.optim import Optimizer

from experiments.environment import UsageError


class Settings(Protocol):
    """What the comparison asks of the settings of an optimizer: a frozen dataclass of plain numbers."""

    __dataclass_fields__: ClassVar[dict[str, Any]]
    lr_grid: ClassVar[tuple[float, ...]]

    @property
    def lr(self) -> float | None:
        """The learning rate; None: found by a sweep over `lr_grid`."""

    @property
    def batch_size(self) -> int:
        """Rows a step."""

    @classmethod
    def for_dimension(cls, dim: int, **changes: Any) -> Self:
        """Give the defaults for data of `dim` components, with changes."""

    def build(self, parameters: Iterable[nn.Parameter], seed: int) -> Optimizer:
        """Build the optimizer."""

    def check(self, parameters: int) -> None:
        """Raise UsageError where a network of this many parameters is out of reach."""


@dataclass(frozen=True, kw_only=True)
class AdamSettings:
    """torch.optim.Adam, its learning rate found by a sweep.

    Attributes:
        lr: Learning rate; None: the best of `lr_grid`.
        batch_size: Rows a step.
        weight_decay: Coefficient of the L2 penalty.
    """

    lr_grid: ClassVar[tuple[float, ...]] = (1e-3, 3e-3, 1e-2, 3e-2)

    lr: float | None = None
    batch_size: int = 1024
    weight_decay: float = 0.0

    @classmethod
    def for_dimension(cls, dim: int, **changes: Any) -> Self:
        """Give the defaults.

        Args:
            dim: Components of a data point.
            **changes: Settings that are to differ.

        Returns:
            Batches of 1024 in two dimensions, where the target is noisy; of 256 above.
        """
        return cls(**{"batch_size": 1024 if dim == 2 else 256} | changes)

    def build(self, parameters: Iterable[nn.Parameter], seed: int) -> Optimizer:
        """Build the optimizer.

        Args:
            parameters: What it trains.
            seed: Not used: Adam draws nothing.

        Returns:
            The optimizer.

        Raises:
            ValueError: If the learning rate has not been found yet.
        """
        if self.lr is None:
            raise ValueError("lr=None has no value to train with: sweep over lr_grid first")
        return torch.optim.Adam(parameters, lr=self.lr, weight_decay=self.weight_decay)

    def check(self, parameters: int) -> None:
        """Accept every network.

        Args:
            parameters: Number of parameters.
        """


@dataclass(frozen=True, kw_only=True)
class HessianFreeSettings:
    """`HessianFree.stochastic`: conjugate gradients, preconditioned by K-FAC, on a part of the gradient's batch.

    Attributes:
        lr: Length of a step, in units of the Newton step.
        damping: λ of the first step.
        batch_size: Rows of the gradient.
        curvature_batch: Rows of the curvature; None: an eighth of the gradient's, at least 256.
        cg_iterations: Conjugate-gradient iterations a step.
        minimum_damping: The floor under λ: the noisier the target, the higher.
        weight_decay: Coefficient of the L2 penalty.
    """

    lr_grid: ClassVar[tuple[float, ...]] = ()

    lr: float = 1.0
    damping: float = 0.3
    batch_size: int = 8192
    curvature_batch: int | None = None
    cg_iterations: int = 3
    minimum_damping: float = 1e-3
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        """Decide the curvature's rows where they are left open, so that the record shows them."""
        if self.curvature_batch is None:
            # Assigning to a frozen dataclass from within needs this detour.
            object.__setattr__(self, "curvature_batch", min(self.batch_size, max(256, self.batch_size // 8)))

    @classmethod
    def for_dimension(cls, dim: int, **changes: Any) -> Self:
        """Give the defaults.

        Args:
            dim: Components of a data point.
            **changes: Settings that are to differ.

        Returns:
            Large batches and a high floor in two dimensions, where the target is noisy; the opposite above.
        """
        if dim == 2:
            return cls(**changes)
        quiet = {"damping": 0.1, "batch_size": 1024 if dim <= 64 else 512, "minimum_damping": 1e-6}
        return cls(**quiet | changes)

    def build(self, parameters: Iterable[nn.Parameter], seed: int) -> Optimizer:
        """Build the optimizer.

        Args:
            parameters: What it trains.
            seed: Of the cotangents that K-FAC samples.

        Returns:
            The optimizer.
        """
        from hessfree import CG, HessianFree, LevenbergMarquardt

        return HessianFree.stochastic(
            parameters,
            lr=self.lr,
            damping=self.damping,
            weight_decay=self.weight_decay,
            solver=CG(max_iterations=self.cg_iterations),
            damping_rule=LevenbergMarquardt(every=5, minimum=self.minimum_damping),
            curvature_batch=self.curvature_batch,
            seed=seed,
        )

    def check(self, parameters: int) -> None:
        """Accept every network: memory grows only linearly with it.

        Args:
            parameters: Number of parameters.

        Raises:
            UsageError: If the curvature asks for more rows than there are.
        """
        if self.curvature_batch is not None and self.curvature_batch > self.batch_size:
            raise UsageError(
                f"--set hessfree.curvature_batch={self.curvature_batch} is more than the batch of {self.batch_size} "
                f"rows; give at most that, or raise hessfree.batch_size"
            )


@dataclass(frozen=True, kw_only=True)
class DenseFisherSettings:
    """The textbook step: the whole Gauss-Newton (Fisher) matrix formed and factorised at every step.

    Attributes:
        lr: Length of a step, in units of the Newton step.
        damping: λ of the first step.
        batch_size: Rows of gradient and curvature; the Jacobian has `batch_size` times D rows.
        weight_decay: Coefficient of the L2 penalty.
    """

    lr_grid: ClassVar[tuple[float, ...]] = ()
    largest: ClassVar[int] = 20_000  # parameters: 1.6 GB a copy of the matrix

    lr: float = 1.0
    damping: float = 0.3
    batch_size: int = 256
    weight_decay: float = 0.0

    @classmethod
    def for_dimension(cls, dim: int, **changes: Any) -> Self:
        """Give the defaults.

        Args:
            dim: Components of a data point.
            **changes: Settings that are to differ.

        Returns:
            Batches small enough to form the matrix in seconds.
        """
        return cls(**{"batch_size": 256 if dim == 2 else 32} | changes)

    def build(self, parameters: Iterable[nn.Parameter], seed: int) -> Optimizer:
        """Build the optimizer.

        Args:
            parameters: What it trains.
            seed: Passed on; this configuration draws nothing.

        Returns:
            The optimizer.
        """
        from hessfree import DenseCholesky, HessianFree, Identity, LevenbergMarquardt

        return HessianFree(
            parameters,
            lr=self.lr,
            damping=self.damping,
            weight_decay=self.weight_decay,
            solver=DenseCholesky(),
            preconditioner=Identity(),
            # Every step, as the dense method is always described: it makes a handful of steps in all.
            damping_rule=LevenbergMarquardt(every=1),
            seed=seed,
        )

    def check(self, parameters: int) -> None:
        """Refuse networks whose matrix does not fit.

        Args:
            parameters: Number of parameters.

        Raises:
            UsageError: If there are too many.
        """
        if parameters > self.largest:
            raise UsageError(
                f"dense-fisher needs a {parameters} x {parameters} matrix ({4e-9 * parameters**2:.0f} GB); "
                f"leave it out: --optimizers hessfree adam"
            )


OPTIMIZERS: dict[str, type[Settings]] = {
    "hessfree": HessianFreeSettings,
    "dense-fisher": DenseFisherSettings,
    "adam": AdamSettings,
}


def default_optimizers(dim: int) -> tuple[str, ...]:
    """Name the optimizers that can say something about data of this dimension.

    Args:
        dim: Components of a data point.

    Returns:
        All in two dimensions; above, without the dense one, whose first step takes minutes.
    """
    return tuple(name for name in OPTIMIZERS if dim == 2 or name != "dense-fisher")


def choose_settings(names: Sequence[str], assignments: Sequence[str], dim: int) -> dict[str, Settings]:
    """Give the settings of a run.

    Args:
        names: Optimizers, in the order in which they will run.
        assignments: What the user changes, each as "optimizer.setting=value".
        dim: Components of a data point.

    Returns:
        Settings by name.

    Raises:
        UsageError: If an optimizer or setting does not exist, or a value is not possible.
    """
    for name in names:
        if name not in OPTIMIZERS:
            raise UsageError(f"--optimizers {name!r} is unknown; choose from: {', '.join(OPTIMIZERS)}")
        if list(names).count(name) > 1:
            raise UsageError(f"--optimizers names {name!r} twice; name each optimizer once")
    changes: dict[str, dict[str, Any]] = {name: {} for name in names}
    for assignment in assignments:
        optimizer, setting, value = _parse(assignment)
        if optimizer not in changes:
            raise UsageError(f"--set {assignment!r}: {optimizer} does not run; add it to --optimizers")
        changes[optimizer][setting] = value
    return {name: OPTIMIZERS[name].for_dimension(dim, **changed) for name, changed in changes.items()}


def _parse(assignment: str) -> tuple[str, str, int | float | None]:
    """Split "optimizer.setting=value" and convert the value to the setting's type."""
    left, equals, text = assignment.partition("=")
    optimizer, dot, setting = left.strip().partition(".")
    if not (equals and dot):
        raise UsageError(f"--set {assignment!r} is no assignment; write it as hessfree.damping=0.1")
    if optimizer not in OPTIMIZERS:
        raise UsageError(f"--set {assignment!r}: no optimizer {optimizer!r}; choose from: {', '.join(OPTIMIZERS)}")
    settings = OPTIMIZERS[optimizer]
    known = [field.name for field in dataclasses.fields(settings)]
    if setting not in known:
        raise UsageError(f"--set {assignment!r}: {optimizer} has no setting {setting!r}; it has: {', '.join(known)}")
    return optimizer, setting, _convert(assignment, text.strip(), get_type_hints(settings)[setting])


def _convert(assignment: str, text: str, hint: Any) -> int | float | None:
    """Read a number of the kind that a type hint (int, float, or one of them or None) asks for."""
    kinds = getattr(hint, "__args__", (hint,))
    if type(None) in kinds and text.lower() == "none":
        return None
    kind = int if int in kinds else float
    wanted = "a positive integer" if kind is int else "a finite number, not negative"
    try:
        value = kind(text)
    except ValueError:
        raise UsageError(f"--set {assignment!r}: {text!r} is no {kind.__name__}; give {wanted}") from None
    if not math.isfinite(value) or value < (1 if kind is int else 0):
        raise UsageError(f"--set {assignment!r}: {text!r} is out of range; give {wanted}")
    return value
