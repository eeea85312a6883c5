"""The rows of BᵀJ held: as two factors at Linear layers, so that J is never formed, and whole elsewhere."""

from __future__ import annotations

import torch
from torch import Tensor

from hessfree.losses import Form, layouts
from hessfree.operators.root import Root
from hessfree.rows import Factors, Leading, OutputGraph, Rows, add_gram, factored_rows
from hessfree.vectors import ParameterVector

MOST_HELD = 2**27  # numbers of U that are held at most: 0.5 GB in float32


class FactoredRoot(Root):
    """U = BᵀJ from one backward pass an output of a sample, whatever the number of samples.

    A row of U belongs to one sample n and one column c of B in it. At a layer x ↦ Wx + b that is called once on plain
    samples it is s_cn a_nᵀ for W, and s_cn for b, with a the layer's input and s = the gradient at its output. Then
    U Uᵀ = Σ over layers of (S Sᵀ) ∘ (A Aᵀ + 1), of which the factors are C·N x out and N x in. The rows of other
    parameters are held whole.

    Attributes:
        rows: U by parts, `[C·N, P]`, a column's samples together.
        parameters: The parameters.
    """

    def __init__(self, rows: Rows, order: Tensor, parameters: ParameterVector) -> None:
        """Take the rows.

        Args:
            rows: U by parts.
            order: For each row, its place in the flat outputs.
            parameters: The parameters.
        """
        self.rows, self.order, self.parameters = rows, order, parameters
        self.count, self.size = len(order), parameters.size
        held = [f.s for f in rows.factors] + list(rows.whole.values())
        self.dtype, self.device = held[0].dtype if held else parameters.dtype, parameters.device
        self.words = " and ".join(["layer factors"] * bool(rows.factors) + ["whole rows"] * bool(rows.whole))

    @classmethod
    def of(cls, graph: OutputGraph, form: Form | None, factor: bool = True) -> FactoredRoot | None:
        """Pull the rows back through the graph of the outputs.

        Args:
            graph: The outputs and the parameters.
            form: H = B Bᵀ; None for B the identity.
            factor: Whether to leave layers in factors; else every row is whole, and U is BᵀJ formed.

        Returns:
            The root; None where outputs share no dimension of samples, or `MOST_HELD` numbers do not hold it.
        """
        counts = {shape[0] if shape else 0 for shape in graph.space.shapes}
        if len(counts) > 1 or 0 in counts or not graph.space.size:
            return None
        whole_samples = list(layouts(graph.space))[-1]
        places = whole_samples.gather(torch.arange(graph.space.size, device=graph.space.device))
        columns = []
        for k in range(whole_samples.width):
            unit = torch.zeros(places.shape, dtype=graph.space.dtype, device=graph.space.device)
            unit[:, k] = 1  # B couples the outputs of one sample only, so that all samples' columns go together
            e = whole_samples.scatter(unit)
            columns.append(e if form is None else form.root(e))
        count = whole_samples.count
        leading = Leading(tuple(range(len(graph.space.shapes))), count, count, columns)
        rows = factored_rows(graph, leading, MOST_HELD, factor)
        return None if rows is None else cls(rows, places.T.reshape(-1), graph.parameters)

    def matvec(self, v: Tensor) -> Tensor:
        """Return U v `[R]` for `v` `[P]`."""
        pieces = self.parameters.views(v)
        out = v.new_zeros(self.count)
        for f in self.rows.factors:
            s = f.s.view(-1, len(f.a), f.s.shape[1])
            along = s.new_zeros(len(f.a), f.s.shape[1])
            if f.weight is not None:
                along = f.a @ (pieces[f.weight].T if f.turned else pieces[f.weight])
            if f.bias is not None:
                along = along + pieces[f.bias]
            out += (s * along).sum(2).view(-1)
        for i, rows in self.rows.whole.items():
            out += rows @ pieces[i].reshape(-1)
        return out

    def rmatvec(self, u: Tensor) -> Tensor:
        """Return Uᵀu `[P]` for `u` `[R]`."""
        out: list[Tensor | None] = [None] * len(self.parameters.params)
        for f in self.rows.factors:
            samples = len(f.a)
            t = (f.s * u.unsqueeze(1)).view(-1, samples, f.s.shape[1]).sum(0)
            if f.weight is not None:
                out[f.weight] = t.T @ f.a if f.turned else f.a.T @ t
            if f.bias is not None:
                out[f.bias] = t.sum(0)
        for i, rows in self.rows.whole.items():
            out[i] = u @ rows
        pieces = zip(out, self.parameters.numels, strict=True)
        return torch.cat([u.new_zeros(n) if t is None else t.reshape(-1) for t, n in pieces])

    def gram(self, weights: float | Tensor = 1.0) -> Tensor:
        """Return U diag(w) Uᵀ `[R, R]`, the lower triangle (see `Root.gram`).

        Args:
            weights: w: a number, or `[P]`. Layers stay in factors where it is one number for each parameter.

        Returns:
            The matrix.
        """
        out = torch.zeros(self.count, self.count, dtype=self.dtype, device=self.device)
        self._add(out, self, weights, True)
        return out

    def normal_matrix(self) -> Tensor:
        """Return UᵀU `[P, P]`, of a root whose rows are all whole, and exactly symmetric."""
        assert not self.rows.factors
        out = torch.zeros(self.size, self.size, dtype=self.dtype, device=self.device)
        slices = {i: self.parameters.slice_of(self.parameters.params[i]) for i in self.rows.whole}
        for i, left in self.rows.whole.items():
            for j, right in self.rows.whole.items():
                if j <= i:
                    block = left.T @ right
                    out[slices[i], slices[j]] = 0.5 * (block + block.T) if i == j else block
                    if j < i:
                        out[slices[j], slices[i]] = block.T
        return out

    def times(self, other: FactoredRoot) -> Tensor | None:
        """Return U Vᵀ `[R1, R2]` for another root V of the same parameters.

        Args:
            other: V.

        Returns:
            The matrix; None where the two do not hold the same parameters in the same way.
        """
        if self.kind() != other.kind():
            return None
        out = torch.zeros(self.count, other.count, dtype=self.dtype, device=self.device)
        self._add(out, other, 1.0, False)
        return out

    def diagonal(self) -> Tensor:
        """Return the squared norms of the rows `[R]`: the diagonal of U Uᵀ."""
        out = torch.zeros(self.count, dtype=self.dtype, device=self.device)
        for f in self.rows.factors:
            inner = f.a.square().sum(1) + (f.bias is not None)
            out += f.s.square().sum(1) * inner.repeat(self.count // len(inner))
        for rows in self.rows.whole.values():
            out += rows.square().sum(1)
        return out

    def kind(self) -> tuple[object, ...]:
        """Return which parameters are held in which way."""
        return tuple((f.weight, f.bias, f.turned) for f in self.rows.factors), tuple(sorted(self.rows.whole))

    def to(self, dtype: torch.dtype) -> FactoredRoot:
        """Return U in another precision."""
        assert self.order is not None
        return self if dtype == self.dtype else FactoredRoot(self.rows.to(dtype), self.order, self.parameters)

    def _add(self, out: Tensor, other: FactoredRoot, weights: float | Tensor, lower: bool) -> None:
        pieces = self.parameters.views(weights.to(self.dtype)) if isinstance(weights, Tensor) else None
        for f, g in zip(self.rows.factors, other.rows.factors, strict=True):
            _add_layer(out, f, g, pieces, weights, lower)
        for i, rows in self.rows.whole.items():
            w = weights if pieces is None else pieces[i].reshape(-1)
            add_gram(out, rows * w, other.rows.whole[i], lower=lower)


def _add_layer(
    out: Tensor, f: Factors, g: Factors, pieces: list[Tensor] | None, weights: float | Tensor, lower: bool
) -> None:
    """Add what one layer gives to U diag(w) Vᵀ."""
    w = 1.0 if f.weight is None else _number(weights if pieces is None else pieces[f.weight])
    b = 0.0 if f.bias is None else _number(weights if pieces is None else pieces[f.bias])
    if w is not None and b is not None:
        add_gram(out, f.s, g.s, (f.a * w, g.a), b, lower)
        return
    assert pieces is not None
    if f.bias is not None:
        add_gram(out, f.s * pieces[f.bias], g.s, lower=lower)
    if f.weight is not None:  # one unit of the layer's output at a time: the weights differ inside the matrix
        by_unit = pieces[f.weight] if f.turned else pieces[f.weight].T
        for k, unit in enumerate(by_unit):
            add_gram(out, f.s[:, k : k + 1], g.s[:, k : k + 1], (f.a * unit, g.a), 0.0, lower)


def _number(weights: float | Tensor) -> float | None:
    """Return the one number that all weights are; None where they differ."""
    if not isinstance(weights, Tensor):
        return weights
    first = float(weights.reshape(-1)[0])
    return first if bool((weights == first).all()) else None
