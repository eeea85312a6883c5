"""The Hessian of the loss in the network's outputs, of whatever structure it has."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from hessfree.losses.forms import BlockForm, DiagonalForm, Form, SoftmaxForm
from hessfree.losses.layout import layouts
from hessfree.vectors import FlatSpace

Product = Callable[[list[Tensor]], Sequence[Tensor | None]]

LARGEST_BLOCK = 64  # C products form all blocks; beyond this a closed form is tried


class OutputHessian:
    """H, the second derivative of the loss in its outputs z, as an operator on flat vectors `[Z]`.

    Its structure is probed by products and never guessed from a class of losses, so that a loss written
    by hand is served like one of torch's. The scale is the loss's own: for a mean over N samples, H holds
    the 1/N.

    Attributes:
        space: The flat space of the outputs.
    """

    def __init__(self, product: Product, space: FlatSpace, values: Sequence[Tensor | None]) -> None:
        """Wrap a product.

        Args:
            product: Multiplies H by one tensor an output; None in its result stands for zeros.
            space: The flat space of the outputs.
            values: z where known; used only by the closed softmax form, whose result is verified.
        """
        self._product = product
        self._values = values
        self.space = space

    def matvec(self, w: Tensor) -> Tensor:
        """Return H w for `w` `[Z]`."""
        return self.space.flatten(self._product(self.space.split(w)))

    def leading(self, rows: int) -> OutputHessian:
        """Return the Hessian of the loss of the first samples alone.

        Args:
            rows: How many samples (along dimension 0 of every output) to keep.

        Returns:
            The leading blocks of H times N/rows, so that the scale stays that of a mean over samples.
        """
        shapes = [torch.Size((rows, *shape[1:])) for shape in self.space.shapes]
        scale = self.space.shapes[0][0] / rows

        def product(w: list[Tensor]) -> list[Tensor | None]:
            padded = [t.new_zeros(shape) for t, shape in zip(w, self.space.shapes, strict=True)]
            for p, t in zip(padded, w, strict=True):
                p[:rows] = t
            return [None if t is None else t[:rows] * scale for t in self._product(padded)]

        values = [None if v is None else v[:rows] for v in self._values]
        return OutputHessian(product, FlatSpace(shapes, self.space.dtypes, self.space.device), values)

    @functools.cached_property
    def form(self) -> Form | None:
        """H in a closed form, or None where none was found.

        In order: zero, c·I, diagonal, blocks of at most 64 outputs a sample, softmax blocks of any size.
        Each is accepted only if it reproduces the product with a random vector.
        """
        generator = torch.Generator().manual_seed(1)
        w = torch.randn(self.space.size, generator=generator, dtype=torch.float32)
        w = w.to(device=self.space.device, dtype=self.space.dtype)
        y = self.matvec(w)
        # rounding in the outputs' own precision is all that may separate the two
        tolerance = 0.1 * max(torch.finfo(d).eps for d in self.space.dtypes) ** 0.5
        bound = tolerance * y.abs().max()
        for propose in (self._scalar, self._diagonal, self._blocks):
            for form in propose(w, y):
                if bool((form.matvec(w) - y).abs().max() <= bound):
                    return form
        return None

    def _scalar(self, w: Tensor, y: Tensor) -> Iterator[Form]:
        yield DiagonalForm((w @ y) / (w @ w))

    def _diagonal(self, w: Tensor, y: Tensor) -> Iterator[Form]:
        yield DiagonalForm(self.matvec(torch.ones_like(w)))

    def _blocks(self, w: Tensor, y: Tensor) -> Iterator[Form]:
        for layout in layouts(self.space):
            if layout.width <= LARGEST_BLOCK:
                columns = []
                for k in range(layout.width):
                    unit = y.new_zeros(layout.count, layout.width)
                    unit[:, k] = 1
                    columns.append(layout.gather(self.matvec(layout.scatter(unit))))
                yield BlockForm(layout, torch.stack(columns, 2))
            elif len(self._values) == 1 and self._values[0] is not None:
                p = layout.gather(self.space.flatten(self._values)).softmax(1)
                shape = SoftmaxForm(layout, p, y.new_ones(layout.count, 1))
                direction = layout.gather(shape.matvec(w))
                scale = (direction * layout.gather(y)).sum(1, True) / direction.square().sum(1, True)
                yield SoftmaxForm(layout, p, torch.nan_to_num(scale))
