"""What a preconditioner is: a symmetric positive definite M ≈ G + λI whose inverse is cheap.

A preconditioner object holds settings only. What it has learned is a plain dict of tensors and numbers that
`update` returns anew and never changes in place, so that a rejected step can drop it and a checkpoint can
hold it.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hessfree.distributed import ALONE, Ranks
from hessfree.losses import OutputHessian
from hessfree.recording import Call, Output
from hessfree.rows import OutputGraph
from hessfree.solvers import Map
from hessfree.vectors import ParameterVector

State = dict[str, Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Sample:
    """The network on the curvature batch, with its graph: what a preconditioner may look at.

    Attributes:
        parameters: The parameters.
        outputs: z.
        calls: The recorded calls; those of tapped modules hold their inputs.
        hessian: H, the Hessian of the loss in z.
        gradients: The gradient of the loss in z, one an output; None where the loss does not use it.
        samples: N, the number of samples along dimension 0 of every output; 1 where they share none.
        seed: For random cotangents; differs from step to step.
        scale: k: the solver's matrix is k times this sample's G.
        shifts: The diagonal of D at this step, one number a parameter; empty for zeros.
        ranks: The processes that learn together. Everything above is of this rank's batch.
        shares: For every rank, the number of outputs, of signs by samples, and of samples.
        batches: For each output, the number of the batch that it is of, where calls of the network share no samples
            (micro-batches); empty where row n of every output is of sample n.
    """

    parameters: ParameterVector
    outputs: tuple[Output, ...]
    calls: tuple[Call, ...]
    hessian: OutputHessian
    gradients: tuple[Tensor | None, ...]
    samples: int
    seed: int
    scale: float = 1.0
    shifts: Sequence[float] = ()
    ranks: Ranks = ALONE
    shares: Sequence[tuple[int, int, int]] = ()
    batches: tuple[int, ...] = ()

    @classmethod
    def of_all(cls, ranks: Ranks, make: Callable[[], Sample]) -> Sample:
        """Make a sample on every rank, or fail on every rank.

        Args:
            ranks: The processes that learn together.
            make: Makes that of this rank.

        Returns:
            This rank's.
        """
        own = ranks.guard(make)
        rows = ranks.agree(None, own.hessian.space.size, sum(own.batch_rows), own.samples)
        shares = [(int(size), int(rows), int(samples)) for size, rows, samples in rows]
        return dataclasses.replace(own, ranks=ranks, shares=shares)

    def signs(self, generator: torch.Generator, by_samples: bool = False) -> Tensor:
        """Draw random signs for the batches of all ranks, one after another, and return those of this rank's.

        Args:
            generator: In the same state on all ranks; it advances by as much on all.
            by_samples: One for each sample of the longest output of each batch, not one for each output.

        Returns:
            Ones and minus ones, in the outputs' dtype.
        """
        space = self.hessian.space
        own = (space.size, sum(self.batch_rows), self.samples)
        counts = [share[int(by_samples)] for share in self.shares or [own]]
        first = sum(counts[: self.ranks.rank])
        drawn = torch.randint(0, 2, (sum(counts),), generator=generator, device=space.device)
        return drawn[first : first + own[int(by_samples)]].to(space.dtype).mul_(2).sub_(1)

    @property
    def batch_rows(self) -> list[int]:
        """The number of samples of each batch: of its output that has the most."""
        shapes = self.hessian.space.shapes
        rows = [0] * (max(self.batches, default=0) + 1)
        for shape, batch in zip(shapes, self.batches or [0] * len(shapes), strict=True):
            rows[batch] = max(rows[batch], shape[0] if shape else 1)
        return rows

    @property
    def mean_over(self) -> int:
        """The number of samples that the loss is taken for a mean over: those of all batches."""
        return max(sum(self.batch_rows), 1) if self.batches else self.samples

    @property
    def graph(self) -> OutputGraph:
        """The outputs, to pull rows of J back from."""
        return OutputGraph(self.parameters, self.outputs, self.hessian.space, self.seed)

    def generator(self) -> torch.Generator:
        """Return a generator on the outputs' device, seeded by the step."""
        return torch.Generator(self.hessian.space.device).manual_seed(self.seed)


class Preconditioner(Protocol):
    """Approximates (k G + D)⁻¹ for a diagonal D that may change at every step."""

    @property
    @abstractmethod
    def taps(self) -> tuple[type[nn.Module], ...]:
        """The types of modules whose inputs `update` needs."""
        ...

    @abstractmethod
    def due(self, state: State, step: int) -> bool:
        """Tell whether `update` wants a sample at step number `step`."""
        ...

    @abstractmethod
    def update(self, state: State, sample: Sample, step: int) -> tuple[State, str | None]:
        """Learn from `sample`.

        Args:
            state: What was learned so far; empty at first. Not changed.
            sample: The network on the curvature batch.
            step: Number of the step.

        Returns:
            The new state, and a warning or None.
        """
        ...

    @abstractmethod
    def inverse(self, state: State, parameters: ParameterVector, scale: float, shifts: Sequence[float]) -> Map | None:
        """Return the map r ↦ M⁻¹ r.

        Args:
            state: What was learned.
            parameters: The parameters.
            scale: k: the solver's matrix is k times the sample's G.
            shifts: The diagonal of D, one number a parameter.

        Returns:
            The map on `[P]` vectors; None for the identity.
        """
        ...

    @abstractmethod
    def describe(self, state: State) -> str:
        """Return what a report says of it."""
        ...
