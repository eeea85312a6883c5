"""Closed forms of the output Hessian, each with a square root to sample from."""

from __future__ import annotations

import abc
import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from hessfree.losses.layout import Layout, layouts
from hessfree.vectors import FlatSpace


class Form(abc.ABC):
    """A closed form of H with a square root B, H = B Bᵀ (negative parts clamped to zero).

    Attributes:
        words: What a report says of it.
        determined: Whether one product with H tells that a form fits. The numbers of a form may be as many as those of
            the product that they were taken from (a weight for each block of two): then a second has to fit.
    """

    words: str
    determined: bool = True

    @property
    @abc.abstractmethod
    def negative(self) -> float:
        """Share of the absolute eigenvalues of H that are negative, and clamped in B; 0 up to rounding."""

    @property
    def constant(self) -> Tensor | None:
        """The number c as a tensor where H = c·I; else None."""
        return None

    @abc.abstractmethod
    def matvec(self, w: Tensor) -> Tensor:
        """Return H w for `w` `[Z]`."""

    @abc.abstractmethod
    def root(self, e: Tensor) -> Tensor:
        """Return B e for `e` `[Z]`."""

    @abc.abstractmethod
    def transposed_root(self, w: Tensor) -> Tensor:
        """Return Bᵀ w for `w` `[Z]`."""

    def sample(self, generator: torch.Generator, like: FlatSpace) -> Tensor:
        """Draw u `[Z]` with E[u uᵀ] = H: B times random signs.

        Args:
            generator: On the outputs' device.
            like: The flat space of the outputs.

        Returns:
            The sample.
        """
        signs = torch.randint(0, 2, (like.size,), generator=generator, device=like.device)
        return self.root(signs.to(like.dtype).mul_(2).sub_(1))

    @abc.abstractmethod
    def within(self, whole: FlatSpace, rows: slice) -> Form:
        """Return the rows and columns of H that belong to some of the samples.

        Args:
            whole: The flat space of the outputs; they share dimension 0, the samples.
            rows: Which samples.

        Returns:
            A form on the outputs of these samples: every form couples outputs of one sample only.
        """

    @abc.abstractmethod
    def columns(self, like: FlatSpace) -> Iterator[Tensor]:
        """Yield u_c `[Z]`, such that within each block Σ_c u_c u_cᵀ = H.

        (Entries of the sum between different blocks mean nothing.)

        Args:
            like: The flat space of the outputs.

        Yields:
            As many vectors as a block has entries.
        """


class DiagonalForm(Form):
    """H = diag(h), or c·I."""

    def __init__(self, h: Tensor) -> None:
        """Take h, `[Z]` or a scalar."""
        self.h = h
        self._root = h.clamp_min(0).sqrt()
        self.words = "diagonal" if h.ndim else "scalar"

    @functools.cached_property
    def negative(self) -> float:
        """See `Form.negative`."""
        return _negative_share(self.h, 0)

    @property
    def constant(self) -> Tensor | None:
        """The number c as a tensor where H = c·I; else None."""
        return None if self.h.ndim else self.h

    def matvec(self, w: Tensor) -> Tensor:
        """Return H w for `w` `[Z]`."""
        return self.h * w

    def root(self, e: Tensor) -> Tensor:
        """Return B e for `e` `[Z]`."""
        return self._root * e

    def transposed_root(self, w: Tensor) -> Tensor:
        """Return Bᵀ w for `w` `[Z]`, which is B w."""
        return self._root * w

    def within(self, whole: FlatSpace, rows: slice) -> DiagonalForm:
        """See `Form.within`."""
        return DiagonalForm(whole.take_rows(self.h, rows) if self.h.ndim else self.h)

    def columns(self, like: FlatSpace) -> Iterator[Tensor]:
        """Yield one vector for each output of a sample, zero elsewhere (see `Form.columns`).

        Args:
            like: The flat space of the outputs.

        Yields:
            As many vectors as a sample has outputs.
        """
        root = self._root.expand(like.size)
        rows = next((layout for layout in reversed(list(layouts(like)))), None)
        if rows is None:
            yield from torch.diag(root)
            return
        blocks = rows.gather(root)
        for k in range(rows.width):
            column = torch.zeros_like(blocks)
            column[:, k] = blocks[:, k]
            yield rows.scatter(column)


def _positions(layout: Layout, like: FlatSpace, factor: Tensor) -> Iterator[Tensor]:
    """Yield masks `[count, 1]` of one block a sample: a network may mix the positions of a sample, but not samples."""
    samples = like.shapes[0][0] if like.shapes[0] else 1
    positions = max(layout.count // max(samples, 1), 1)
    place = torch.arange(layout.count, device=factor.device) % positions
    for p in range(positions):
        yield (place == p).to(factor.dtype).unsqueeze(1)


class BlockForm(Form):
    """H = block-diag over the blocks of a layout, each small and dense."""

    def __init__(self, layout: Layout, blocks: Tensor) -> None:
        """Take the blocks, `[count, width, width]`."""
        self._layout = layout
        self._blocks = 0.5 * (blocks + blocks.mT)  # its columns are products, rounded each for itself
        self.words = f"blocks of {layout.width}"

    @functools.cached_property
    def _eigen(self) -> tuple[Tensor, Tensor]:
        return torch.linalg.eigh(self._blocks)

    @functools.cached_property
    def negative(self) -> float:
        """See `Form.negative`."""
        return _negative_share(self._eigen[0], self._layout.width)

    @functools.cached_property
    def _factor(self) -> Tensor:
        values, vectors = self._eigen
        return vectors * values.clamp_min(0).sqrt().unsqueeze(-2)

    def matvec(self, w: Tensor) -> Tensor:
        """Return H w for `w` `[Z]`."""
        return self._apply(self._blocks, w)

    def root(self, e: Tensor) -> Tensor:
        """Return B e for `e` `[Z]`."""
        return self._apply(self._factor, e)

    def transposed_root(self, w: Tensor) -> Tensor:
        """Return Bᵀ w for `w` `[Z]`."""
        return self._apply(self._factor.mT, w)

    def within(self, whole: FlatSpace, rows: slice) -> BlockForm:
        """See `Form.within`."""
        return BlockForm(self._layout.within(whole.of_rows(rows)), self._blocks[_blocks_of(rows, whole, self._layout)])

    def columns(self, like: FlatSpace) -> Iterator[Tensor]:
        """Yield the columns of every block's root (see `Form.columns`).

        Args:
            like: The flat space of the outputs.

        Yields:
            `width` vectors for each position of a sample (a token, a pixel).
        """
        for here in _positions(self._layout, like, self._factor):
            for k in range(self._layout.width):
                yield self._layout.scatter(self._factor[:, :, k] * here)

    def _apply(self, blocks: Tensor, w: Tensor) -> Tensor:
        return self._layout.scatter(torch.einsum("bij,bj->bi", blocks, self._layout.gather(w)))


class SoftmaxForm(Form):
    """H = s (diag(p) − p pᵀ) in each block: cross-entropy of a softmax, with a weight s a block.

    Its root is B = √s (diag(√p) − p √pᵀ), since pᵀ1 = 1.
    """

    def __init__(self, layout: Layout, p: Tensor, scale: Tensor) -> None:
        """Take the probabilities `[count, width]` and the weights `[count, 1]`."""
        self._layout = layout
        self._p = p
        self._scale = scale
        self.words = f"softmax over {layout.width}"
        self.determined = layout.width > 2

    @functools.cached_property
    def negative(self) -> float:
        """See `Form.negative`."""
        traces = self._scale.squeeze(1) * (self._p - self._p.square()).sum(1)
        return _negative_share(traces, 0)

    def matvec(self, w: Tensor) -> Tensor:
        """Return H w for `w` `[Z]`."""
        w = self._layout.gather(w)
        return self._layout.scatter(self._scale * self._p * (w - (self._p * w).sum(1, True)))

    def root(self, e: Tensor) -> Tensor:
        """Return B e for `e` `[Z]`."""
        return self._layout.scatter(self._root(self._layout.gather(e)))

    def transposed_root(self, w: Tensor) -> Tensor:
        """Return Bᵀ w for `w` `[Z]`."""
        w = self._layout.gather(w)
        half = self._scale.clamp_min(0).sqrt() * self._p.sqrt()
        return self._layout.scatter(half * (w - (self._p * w).sum(1, True)))

    def within(self, whole: FlatSpace, rows: slice) -> SoftmaxForm:
        """See `Form.within`."""
        blocks = _blocks_of(rows, whole, self._layout)
        return SoftmaxForm(self._layout.within(whole.of_rows(rows)), self._p[blocks], self._scale[blocks])

    def columns(self, like: FlatSpace) -> Iterator[Tensor]:
        """Yield the columns of every block's root (see `Form.columns`).

        Args:
            like: The flat space of the outputs.

        Yields:
            `width` vectors for each position of a sample (a token, a pixel).
        """
        for here in _positions(self._layout, like, self._p):
            for k in range(self._layout.width):
                unit = torch.zeros_like(self._p)
                unit[:, k] = 1
                yield self._layout.scatter(self._root(unit) * here)

    def _root(self, e: Tensor) -> Tensor:
        half = self._p.sqrt()
        return self._scale.clamp_min(0).sqrt() * (half * e - self._p * (half * e).sum(1, True))


def _blocks_of(rows: slice, whole: FlatSpace, layout: Layout) -> slice:
    """Return which blocks of a layout belong to these samples: samples come first in the order of the blocks."""
    each = layout.count // whole.shapes[0][0]
    return slice(rows.start * each, rows.stop * each)


def _negative_share(values: Tensor, width: int) -> float:
    total = values.abs().sum()
    share = float(values.clamp_max(0).abs().sum() / total) if bool(total > 0) else 0.0
    # eigenvalues of a block that are zero come out with either sign, after some cancellation in the products
    return share if share > 1000 * width * torch.finfo(values.dtype).eps else 0.0
