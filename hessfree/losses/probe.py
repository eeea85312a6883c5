"""Closed forms of the output Hessian, proposed from one product with it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from hessfree.losses.forms import DiagonalForm, Form, SoftmaxForm
from hessfree.losses.joined_form import JoinedForm
from hessfree.losses.layout import layouts
from hessfree.vectors import FlatSpace

Fits = Callable[[Form, Tensor, Tensor], bool]  # whether a form takes a vector to what H takes it to


@dataclasses.dataclass(frozen=True, eq=False)
class Probe:
    """A random vector w and its product H w, and the closed forms that H may have by them.

    Attributes:
        space: The flat space of the outputs.
        values: z where known, one an output; used by the softmax alone.
        w: `[Z]`.
        y: H w.
        times_ones: Returns H times a vector of ones; called at most once.
    """

    space: FlatSpace
    values: Sequence[Tensor | None]
    w: Tensor
    y: Tensor
    times_ones: Callable[[], Tensor]

    @functools.cached_property
    def _row_sums(self) -> Tensor:
        return self.times_ones()

    def scalar(self) -> Iterator[Form]:
        """Propose c·I.

        Yields:
            One form; none where there are no outputs.
        """
        if self.space.size:
            yield DiagonalForm(self.y[0] / self.w[0])

    def diagonal(self) -> Iterator[Form]:
        """Propose a diagonal, by the product with ones.

        Yields:
            One form.
        """
        yield DiagonalForm(self._row_sums)

    def softmax(self) -> Iterator[Form]:
        """Propose blocks of a softmax of z with a weight each, the weights from w and H w.

        Yields:
            A form for each way to see the outputs as blocks; none for several outputs.
        """
        if len(self.values) != 1 or self.values[0] is None:
            return
        for layout in layouts(self.space):
            if layout.width > 1:
                p = layout.gather(self.space.flatten(self.values)).softmax(1)
                shape = SoftmaxForm(layout, p, self.y.new_ones(layout.count, 1))
                direction = layout.gather(shape.matvec(self.w))
                scale = (direction * layout.gather(self.y)).sum(1, True) / direction.square().sum(1, True)
                yield SoftmaxForm(layout, p, torch.nan_to_num(scale))

    def joined(self, fits: Fits) -> Iterator[Form]:
        """Propose a closed form for each of several outputs, as if the loss coupled no two of them.

        Args:
            fits: Asked of each output's form, with the pieces of w and H w at this output.

        Yields:
            One form; none where an output has none, or where all are diagonal, and so is H.
        """
        if len(self.space.shapes) < 2:
            return
        forms: list[Form] = []
        for part in self._parts():
            form = part._first(fits)
            if form is None:
                return
            forms.append(form)
        if not all(isinstance(form, DiagonalForm) for form in forms):
            yield JoinedForm(forms, self.space)

    def _first(self, fits: Fits) -> Form | None:
        """Return the first form of one output that fits."""
        # zeros are a softmax's too, of weight zero; and where H is next to nothing beside that of other outputs, a
        # number that fits as well as a softmax does may be negative
        proposals = (self.softmax, self.scalar, self.diagonal) if bool(self.y.any()) else (self.scalar, self.diagonal)
        return next((form for propose in proposals for form in propose() if fits(form, self.w, self.y)), None)

    def _parts(self) -> Iterator[Probe]:
        """Yield what each output alone would be probed with: no product more, if it is coupled with no other."""
        numels = self.space.numels
        pieces = zip(self.space.shapes, self.values, self.w.split(numels), self.y.split(numels), strict=True)
        for i, (shape, value, w, y) in enumerate(pieces):
            own = FlatSpace([shape], [self.space.dtype], self.space.device)
            yield Probe(own, [value], w, y, functools.partial(self._row_sums_of, i))

    def _row_sums_of(self, output: int) -> Tensor:
        return self._row_sums.split(self.space.numels)[output]
