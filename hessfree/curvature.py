"""Everything about the curvature at θ that one step needs: the operator, and what a preconditioner may look at."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hessfree.curvature_batch import chunks, leading_rows
from hessfree.distributed import ALONE, Ranks
from hessfree.linearization import (
    BACKENDS,
    ChunkedLinearization,
    Evaluation,
    Linearization,
    TraceCache,
    choose,
    linearize_in_chunks,
)
from hessfree.losses import OutputHessian
from hessfree.operators import Averaged, GaussNewton, Hessian, SymmetricOperator
from hessfree.preconditioners import Sample
from hessfree.recording import (
    Cut,
    CutPlace,
    Output,
    Owners,
    Path,
    Recording,
    Tail,
    explains_gradient,
    find_cut,
    make_cut,
)
from hessfree.vectors import ParameterVector


@dataclasses.dataclass(frozen=True, eq=False)
class Curvature:
    """The curvature of the recorded loss at the present parameters.

    Attributes:
        operator: G (or the exact Hessian), in the recorded loss's scale.
        backend: Which linearisation makes the products.
        cut: In words, where the network ends.
        samples: Samples in the curvature batch.
        sample: Makes what a preconditioner may look at, for which the network may have to be evaluated once more;
            None where there are no outputs z.
        local: G of this rank's batch alone; None where there is one rank.
        tail: The loss behind the outputs, whose gradients `sample` looks at.
    """

    operator: SymmetricOperator
    backend: str
    cut: str
    samples: int
    sample: Callable[[], Sample] | None
    local: SymmetricOperator | None = None
    tail: Tail | None = None

    def here(self, factor: float) -> SymmetricOperator:
        """Return `factor` times G of this rank's batch alone."""
        assert self.local is not None
        return self.local.scaled(factor)

    def settle(self) -> bool:
        """Forget what `sample` alone needs.

        Returns:
            Whether products look at nothing of the recording: neither its graph nor what its calls were given.
        """
        if self.tail is not None:
            self.tail.forget_values()
        own = self.operator if self.local is None else self.local
        return isinstance(own, GaussNewton) and own.let_go()


class CurvatureBuilder:
    """Builds the curvature of one recording after another, and remembers where the cut was found.

    Nothing that it remembers changes a result: a cut is a function of the structure of the calls.
    """

    def __init__(
        self,
        owners: Owners,
        model: nn.Module | None,
        backend: str,
        curvature_batch: int | float | None,
        taps: tuple[type, ...],
        microbatch: int | None = None,
        compile: bool = False,
        keeps_autocast: bool = False,
    ) -> None:
        """Take the settings.

        Args:
            owners: The modules that own the parameters.
            model: Search the cut only at calls of this module; None for all.
            backend: Name of the linearisation.
            curvature_batch: Samples to use, see `check_curvature_batch`.
            taps: Types of modules whose inputs the preconditioner needs.
            microbatch: Samples that products take at a time; None for all.
            compile: Whether to hand traces to torch.compile.
            keeps_autocast: Whether the products are in the precision of the closure's autocast.
        """
        self._owners = owners
        self._model = model
        self._backend = backend
        self._curvature_batch = curvature_batch
        self._taps = taps
        self._microbatch = microbatch
        self._traces = TraceCache(compile=compile, keeps_autocast=keeps_autocast)
        self._keeps_autocast = keeps_autocast
        self._signature: Any = None
        self._reach: Any = None
        self._place: CutPlace | None = None

    def keeps_inputs(self, module: nn.Module) -> bool:
        """Tell whether to keep the inputs of calls of `module`."""
        return isinstance(module, self._taps)

    def keeps_value(self, path: Path) -> bool:
        """Tell whether to keep the values that the call at `path` returned: all until a cut is known."""
        return self._place is None or len(path) == 1 or path in self._place.paths

    def build(
        self,
        recording: Recording,
        parameters: ParameterVector,
        seed: int,
        warn: Callable[[str], None],
        scale: float = 1.0,
        shifts: Sequence[float] = (),
        ranks: Ranks = ALONE,
    ) -> Curvature:
        """Build the curvature of `recording`.

        Args:
            recording: A closure's run, its graph alive.
            parameters: The parameters.
            seed: For the preconditioner's random cotangents.
            warn: Told, once a message, what the user should know.
            scale: k: the solver's matrix is k times the recording's G.
            shifts: The diagonal that the solver adds, one number a parameter.
            ranks: The processes over which the curvature is averaged.

        Returns:
            The curvature.
        """
        details = seed, warn, scale, shifts, ranks
        if ranks.size == 1:
            return self._build(recording, parameters, self._backend, *details)
        here = ranks.guard(lambda: self._build(recording, parameters, self._backend, *details))
        facts = ranks.agree(None, BACKENDS.index(here.backend), here.sample is None)

        def fall_back() -> Curvature:
            if here.backend == "graph":
                return here
            warn("another rank cannot use the back end that this one can; the autograd graph is used on all")
            return self._build(recording, parameters, "graph", *details)

        if any(backend != facts[0][0] for backend, _ in facts):
            here = ranks.guard(fall_back)  # a warning may be an error
        sample = None if any(none for _, none in facts) else here.sample
        averaged = Averaged(here.operator, ranks)
        return dataclasses.replace(here, operator=averaged, sample=sample, local=here.operator)

    def _build(
        self,
        recording: Recording,
        parameters: ParameterVector,
        backend: str,
        seed: int,
        warn: Callable[[str], None],
        scale: float,
        shifts: Sequence[float],
        ranks: Ranks,
    ) -> Curvature:
        """Build the curvature of this rank's recording."""
        cut = self._cut(recording, parameters, warn)
        if not cut.outputs:
            return Curvature(Hessian(cut.tail, parameters), "graph", cut.place.words, 0, None)
        rows = leading_rows(recording, cut, self._curvature_batch, warn)
        evaluation, linearization = self._evaluate(recording, cut, rows, parameters, warn, backend)
        part = None if evaluation.rows is None else evaluation.samples
        hessian = OutputHessian.of(cut) if part is None else OutputHessian.of(cut).leading(part)
        hessian = hessian.in_precision_of(linearization.space)
        chunked = isinstance(linearization, ChunkedLinearization)

        def outputs() -> Sequence[Output] | None:
            return None if chunked or evaluation.network is None else evaluation.network.outputs

        direct = cut.tail if cut.tail.has_direct else None
        operator = GaussNewton(linearization, hessian, parameters, direct, outputs)

        def make() -> Sample:
            network, batches = evaluation.network, evaluation.batches()
            assert network is not None
            return Sample(
                parameters,
                network.outputs,
                network.roots,
                hessian,
                _gradients(cut, part, hessian.space.dtypes),
                max(evaluation.samples, 1),
                seed,
                scale,
                shifts,
                batches=() if hessian.couples(batches) else batches,
            )

        def sample() -> Sample:
            return Sample.of_all(ranks, make)

        words, samples = cut.place.words, evaluation.samples
        return Curvature(operator, linearization.name, words, samples, sample, tail=cut.tail)

    def _evaluate(
        self,
        recording: Recording,
        cut: Cut,
        rows: int | None,
        parameters: ParameterVector,
        warn: Callable[[str], None],
        backend: str,
    ) -> tuple[Evaluation, Linearization]:
        """Linearise on a part of the batch, or on all of it where the part meets another network."""
        precise = not self._keeps_autocast

        def evaluation_of(part: slice | None) -> Evaluation:
            return Evaluation(
                recording, cut.outputs, cut.calls, parameters, part, self._owners, self.keeps_inputs, precise
            )

        def refuse(why: str) -> None:
            warn(f"{why}; the autograd graph is used instead")

        how = parameters, self._traces, refuse
        while True:
            evaluation = evaluation_of(None if rows is None else slice(0, rows))
            parts = chunks(recording, cut, rows, self._microbatch, warn)
            if parts:
                chunked = linearize_in_chunks(backend, parts, evaluation_of, *how)
                if chunked is not None:
                    return evaluation, chunked
            found = choose(backend, evaluation, *how)
            if found is not None:
                if not (self._keeps_autocast or evaluation.precise or found.name == "traced"):
                    warn(
                        "the products are in the precision of the closure's autocast: the network could not be "
                        "evaluated again without it. Give curvature_precision='autocast' if that is meant"
                    )
                if parts:
                    warn(
                        f"microbatch={self._microbatch!r} cannot be used, and products take all samples at a time: the "
                        "network gives other outputs on a part of the batch (dropout, or BatchNorm in train mode)"
                    )
                return evaluation, found
            if rows is None:
                precise = False
                continue
            warn(
                f"curvature_batch={self._curvature_batch!r} cannot be used, and the whole batch is: the network gives "
                "other outputs on a part of the batch (dropout, or BatchNorm in train mode)"
            )
            rows = None

    def _cut(self, recording: Recording, parameters: ParameterVector, warn: Callable[[str], None]) -> Cut:
        signature = recording.signature()
        if self._place is not None and signature == self._signature:
            cut = make_cut(recording, parameters, self._place)
            # the same calls may feed another loss: another head, a penalty that is new
            if cut.tail.reach == self._reach:
                return cut
        place = find_cut(recording, parameters, self._model)
        cut = make_cut(recording, parameters, place)
        if not explains_gradient(cut, recording, parameters):
            place = CutPlace(
                (),
                "none: exact Hessian",
                "the outputs of the modules do not explain the gradient of the loss (a custom autograd function "
                "whose backward is not its derivative?); HessianFree uses the exact Hessian of the loss",
            )
            cut = make_cut(recording, parameters, place)
        if place.warning is not None:
            warn(place.warning)
        # that the loss has no curvature here may be a matter of its values (Huber, all in the linear zone)
        self._place = place if place.places else None
        self._signature, self._reach = signature, cut.tail.reach
        return cut


def _gradients(cut: Cut, rows: int | None, dtypes: Sequence[torch.dtype]) -> tuple[Tensor | None, ...]:
    """Return d ell/dz of the evaluated samples, scaled to a mean over them."""
    found = [None if g is None else g.to(dtype) for g, dtype in zip(cut.tail.gradients, dtypes, strict=True)]
    if rows is None:
        return tuple(found)
    return tuple(None if g is None else g[:rows] * (g.shape[0] / rows) for g in found)
