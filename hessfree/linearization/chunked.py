"""J by chunks of samples: memory for one chunk in the place of the whole batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from hessfree.linearization.base import Linearization, LinearizationError
from hessfree.linearization.evaluation import Evaluation
from hessfree.linearization.select import choose
from hessfree.linearization.traced import TraceCache
from hessfree.losses import Form
from hessfree.recording import Output, space_of
from hessfree.vectors import FlatSpace, ParameterVector


class ChunkedLinearization:
    """J chunk by chunk, for networks that do not mix samples.

    What a linearisation keeps, activations or a graph, is kept for one chunk at a time, and the network is evaluated
    again at every product: Jv, Jᵀu, and JᵀHJv by `gauss_newton`, each cost one forward pass of all samples more than
    at a linearisation that is kept. The sum over chunks differs from the product of all samples by rounding alone.

    Attributes:
        name: The back end that linearises the chunks.
        stands_alone: Whether products use neither an autograd graph nor the network: they do.
        space: The flat space `[Z]` of the outputs of all samples.
    """

    stands_alone = False

    def __init__(
        self,
        name: str,
        chunks: Sequence[slice],
        outputs: Sequence[Output],
        dtypes: Sequence[torch.dtype],
        linearize: Callable[[slice], Linearization],
    ) -> None:
        """Take the chunks.

        Args:
            name: The back end that linearises them.
            chunks: Which samples each has: slices that follow each other from 0 without gaps.
            outputs: z as recorded, of these samples and perhaps of more.
            dtypes: Of the chunks' outputs; recorded under autocast, z may have been rounded to others.
            linearize: Evaluates the network on some samples and returns its linearisation, which is dropped after
                one product.
        """
        self.name = name
        recorded = space_of(outputs).of_rows(slice(0, chunks[-1].stop))
        self.space = FlatSpace(recorded.shapes, dtypes, recorded.device)
        self._chunks, self._outputs, self._linearize = tuple(chunks), tuple(outputs), linearize

    @property
    def outputs(self) -> Tensor:
        """The outputs z, flat `[Z]`, without graph."""
        count = self._chunks[-1].stop
        return self.space.flatten([None if o.value is None else o.value[:count] for o in self._outputs])

    def jvp(self, v: Tensor) -> Tensor:
        """Return J v `[Z]` for `v` `[P]`."""
        out = self.space.zeros()
        for rows, part in self._parts():
            self.space.put_rows(out, rows, part.jvp(v))
        return out

    def vjp(self, u: Tensor) -> Tensor:
        """Return Jᵀ u `[P]` for `u` `[Z]`."""
        return _sum(part.vjp(self.space.take_rows(u, rows)) for rows, part in self._parts())

    def vjps(self, u: Tensor) -> Tensor:
        """Return Jᵀ applied to each row of `u` `[K, Z]`, as `[K, P]`; chunks where all are zero are left out."""
        taken = [torch.stack([self.space.take_rows(row, rows) for row in u]) for rows in self._chunks]
        wanted = [i for i, part in enumerate(taken) if bool(part.any())] or [0]
        return _sum(self._linearize(self._chunks[i]).vjps(taken[i]) for i in wanted)

    def gauss_newton(self, v: Tensor, h: Tensor | float) -> Tensor:
        """Return Jᵀ(h · J v) `[P]` with one evaluation of the network.

        Args:
            v: `[P]`.
            h: The diagonal of H, a number or `[Z]`.

        Returns:
            The product.
        """
        if isinstance(h, Tensor) and h.ndim:
            return _sum(part.gauss_newton(v, self.space.take_rows(h, rows)) for rows, part in self._parts())
        return _sum(part.gauss_newton(v, h) for _, part in self._parts())

    def gauss_newton_by_samples(self, v: Tensor, form: Form) -> Tensor:
        """Return JᵀHJ v `[P]` with one evaluation of the network, where H couples no two samples.

        Args:
            v: `[P]`.
            form: H, block diagonal over samples as every closed form is.

        Returns:
            The product.
        """
        return _sum(part.vjp(form.within(self.space, rows).matvec(part.jvp(v))) for rows, part in self._parts())

    def _parts(self) -> Iterator[tuple[slice, Linearization]]:
        for rows in self._chunks:
            yield rows, self._linearize(rows)


def linearize_in_chunks(
    backend: str,
    chunks: Sequence[slice],
    evaluation_of: Callable[[slice], Evaluation],
    parameters: ParameterVector,
    traces: TraceCache,
    refuse: Callable[[str], None],
) -> ChunkedLinearization | None:
    """Linearise by chunks, with the back end asked for or the next that serves the network; see `choose`.

    Args:
        backend: Name of the back end.
        chunks: Which samples each chunk has: slices that follow each other from 0 without gaps.
        evaluation_of: Describes the network on some samples; every call returns a new evaluation.
        parameters: The parameters.
        traces: Where traces are kept: one for the chunks, and one for the last where it is smaller.
        refuse: Told why a back end is not used.

    Returns:
        The linearisation; None where a chunk meets another network than the one recorded.
    """
    state = _state(parameters)

    def linearize(rows: slice) -> Linearization:
        found = None
        if _state(parameters) == state:
            found = choose(backend, evaluation_of(rows), parameters, traces, refuse)
        if found is None:
            raise LinearizationError(
                "the parameters or inputs were changed since the network was linearised; chunks are evaluated again at "
                "every product, so build the operator anew after an update, or use microbatch=None"
            )
        return found

    facts = []
    for rows in chunks:
        found = choose(backend, evaluation_of(rows), parameters, traces, refuse)
        if found is None:
            return None
        facts.append((found.name, found.space.dtypes))
    name, dtypes = facts[0]
    return ChunkedLinearization(name, chunks, evaluation_of(chunks[0]).outputs, dtypes, linearize)


def chunks_of(count: int, size: int, start: int = 0) -> list[slice]:
    """Return slices of `size` that cover the samples from `start` to `count`; the last may be shorter."""
    return [slice(i, min(i + size, count)) for i in range(start, count, size)]


def check_microbatch(size: int | None) -> None:
    """Raise a ValueError unless `size` is a positive number of samples, or None."""
    if size is None or (isinstance(size, int) and not isinstance(size, bool) and size >= 1):
        return
    raise ValueError(
        f"microbatch={size!r} must be a number of samples (an int, 1 or more), or None for products of all at a time"
    )


def _state(parameters: ParameterVector) -> list[tuple[int, torch.dtype]]:
    return [(p._version, p.dtype) for p in parameters.params]


def _sum(vectors: Iterator[Tensor]) -> Tensor:
    total = next(vectors)
    for vector in vectors:
        total.add_(vector)
    return total
