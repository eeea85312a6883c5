"""The Hessian of the loss in the network's outputs, of whatever structure it has."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from hessfree.losses.forms import BlockForm, DiagonalForm, Form
from hessfree.losses.joined_form import JoinedForm
from hessfree.losses.layout import layouts
from hessfree.losses.probe import Fits, Probe
from hessfree.recording import Cut, space_of
from hessfree.vectors import FlatSpace

Product = Callable[[list[Tensor]], Sequence[Tensor | None]]

LARGEST_BLOCK = 64  # C products form all blocks
# the random vector of probes repeats itself, for to draw one as long as the outputs takes as long as a product does;
# a prime, since a loss that compared outputs at just this distance might be taken for one that does not
PERIOD = 65521


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

    @classmethod
    def of(cls, cut: Cut) -> OutputHessian:
        """Return the Hessian of the loss behind a cut in its outputs, by products through the loss's graph."""
        return cls(lambda w: cut.tail.product(w)[0], space_of(cut.outputs), [o.value for o in cut.outputs])

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
        scale = self.space.shapes[0][0] / rows

        def product(w: list[Tensor]) -> list[Tensor | None]:
            padded = [t.new_zeros(shape) for t, shape in zip(w, self.space.shapes, strict=True)]
            for p, t in zip(padded, w, strict=True):
                p[:rows] = t
            return [None if t is None else t[:rows] * scale for t in self._product(padded)]

        values = [None if v is None else v[:rows] for v in self._values]
        return OutputHessian(product, self.space.of_rows(slice(0, rows)), values)

    def in_precision_of(self, space: FlatSpace) -> OutputHessian:
        """Return H for outputs that may have been evaluated again in another precision than the loss was given.

        A product through the loss rounds its vector to the precision of z, and rounding is not symmetric: under
        bfloat16 autocast by 4e-3. A closed form is as good as its entries, and symmetric.

        Args:
            space: The flat space of these outputs, of the same shapes.

        Returns:
            H by its closed form, or by rounded products where it has none; itself where the precision is the same.
        """
        if space.dtypes == self.space.dtypes:
            return self
        form = self.form
        if form is None:
            values = [None if v is None else v.to(t) for v, t in zip(self._values, space.dtypes, strict=True)]
            return OutputHessian(self._product, space, values)
        same = OutputHessian(lambda w: space.views(form.matvec(space.flatten(w))), space, [None] * len(space.shapes))
        vars(same)["closed"] = form  # a product with it is one with H here, and z is not needed to find it again
        return same

    @functools.cached_property
    def closed(self) -> Form | None:
        """H in a closed form that multiplies as exactly as H itself and in fewer passes; None where none is known.

        In order: zero or c·I, softmax blocks of any size, a form for each of several outputs, diagonal. It costs one
        product, a diagonal or a softmax of two one more, and several forms up to two more. Each is accepted only if it
        reproduces the products with random vectors to rounding.
        """
        probe = self._probed()
        eps = max(torch.finfo(d).eps for d in self.space.dtypes)
        relative = min(32 * eps, 0.1 * eps**0.5)
        bound = relative * probe.y.norm()
        # where one of several outputs is of next to no curvature, all of it may be rounding
        least = bound / max(len(self.space.shapes), 1) ** 0.5

        def fits(form: Form, w: Tensor, y: Tensor) -> bool:
            limit = bound if y is probe.y else torch.maximum(relative * y.norm(), least)
            return bool(_misfit(form, w, y) <= limit)

        form = self._first((probe.scalar(), probe.softmax(), probe.joined(fits), probe.diagonal()), fits)
        if form is not None:
            self._let_go(form)
        return form

    def find_closed(self) -> bool:
        """Look for a closed form now, and let the loss's graph be freed if there is one.

        Returns:
            Whether there is.
        """
        return self.closed is not None

    def vanishes(self) -> bool:
        """Tell whether H is known to be zero."""
        constant = None if self.closed is None else self.closed.constant
        return constant is not None and not bool(constant)

    def _let_go(self, form: Form) -> None:
        """Multiply by the closed form from now on: the loss's graph, and with it the network's, may be freed."""
        self._product = lambda w: self.space.views(form.matvec(self.space.flatten(w)))
        self._values = [None] * len(self._values)
        del self.__dict__["_probe"]

    @functools.cached_property
    def form(self) -> Form | None:
        """H in a form that has a square root, or None where none was found.

        The closed form, or else blocks of at most 64 outputs a sample, which take as many products. Accepted only if
        it reproduces the products with random vectors; what separates the two may be as small as the noise of
        sampling.
        """
        if self.closed is not None:
            return self.closed
        probe = self._probed()
        bound = 0.1 * max(torch.finfo(d).eps for d in self.space.dtypes) ** 0.5 * probe.y.abs().max()

        def fits(form: Form, w: Tensor, y: Tensor) -> bool:
            return not w.numel() or bool((form.matvec(w) - y).abs().max() <= bound)

        proposals = probe.scalar(), probe.diagonal(), self._blocks(probe.y), probe.softmax(), probe.joined(fits)
        return self._first(proposals, fits)

    def couples(self, groups: Sequence[int]) -> bool:
        """Tell whether the loss couples outputs of different groups.

        Args:
            groups: The number of each output's group, from 0.

        Returns:
            Whether H has an entry between two groups. It takes a product for each bit of a group's number, where no
            closed form tells.
        """
        if not any(groups) or isinstance(self.closed, (DiagonalForm, JoinedForm)):
            return False
        pieces = self.space.split(self._probe[0])
        for bit in range(max(groups).bit_length()):
            inside = [bool(group >> bit & 1) for group in groups]
            found = self._product([t if own else torch.zeros_like(t) for t, own in zip(pieces, inside, strict=True)])
            if any(not own and t is not None and bool(t.any()) for t, own in zip(found, inside, strict=True)):
                return True
        return False

    def _first(self, proposals: Sequence[Iterator[Form]], fits: Fits) -> Form | None:
        """Return the first form that fits, to a second product too where its numbers leave the first no choice."""
        for form in itertools.chain.from_iterable(proposals):
            if fits(form, *self._probe):
                if form.determined:
                    return form
                other = self._probe[0].flip(0)
                if fits(form, other, self.matvec(other)):
                    return form
        return None

    def _probed(self) -> Probe:
        w, y = self._probe
        return Probe(self.space, self._values, w, y, lambda: self.matvec(torch.ones_like(w)))

    @functools.cached_property
    def _probe(self) -> tuple[Tensor, Tensor]:
        size = self.space.size
        w = _random_vector(self.space.device, self.space.dtype)
        w = w[:size] if size <= PERIOD else torch.cat([w] * (size // PERIOD) + [w[: size % PERIOD]])
        found = self._product(self.space.split(w))
        if len(found) == 1 and found[0] is not None and found[0].dtype == self.space.dtype:
            return w, found[0].detach().reshape(-1)  # read only, so that it need not be a copy
        return w, self.space.flatten(found)

    def _blocks(self, y: Tensor) -> Iterator[Form]:
        for layout in layouts(self.space):
            if layout.width > LARGEST_BLOCK:
                continue
            columns = []
            for k in range(layout.width):
                unit = y.new_zeros(layout.count, layout.width)
                unit[:, k] = 1
                columns.append(layout.gather(self.matvec(layout.scatter(unit))))
            yield BlockForm(layout, torch.stack(columns, 2))


def _misfit(form: Form, w: Tensor, y: Tensor) -> Tensor:
    """Return ‖H w − y‖; without a vector of that length where H is a number."""
    if form.constant is None:
        return form.matvec(w).sub_(y).norm()
    pieces = zip(w.split(PERIOD), y.split(PERIOD), strict=True)
    return torch.stack([(form.matvec(a) - b).norm() for a, b in pieces]).norm()


@functools.cache
def _random_vector(device: torch.device, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(1)
    return torch.randn(PERIOD, generator=generator, dtype=torch.float32, device="cpu").to(device=device, dtype=dtype)
