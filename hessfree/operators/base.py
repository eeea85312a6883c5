"""A matrix seen through its products: `A @ v`, `A.to_dense()`, `A.diagonal()`, `A.trace()`, `A.to_scipy()`."""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from hessfree.linearization import call_model
from hessfree.operators.scipy_view import scipy_view
from hessfree.operators.work import Work
from hessfree.recording import CallTree, Cut, Owners, Path, Trace, find_cut, make_cut, trace_loss
from hessfree.rows import Counts
from hessfree.vectors import ParameterVector

if TYPE_CHECKING:
    from hessfree.operators.root import Root


class LinearOperator(abc.ABC):
    """A matrix A that is never formed unless asked for.

    Attributes:
        dtype: Dtype of its vectors.
        device: Device of its vectors.
    """

    dtype: torch.dtype
    device: torch.device

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, int]:
        """(rows, columns)."""

    @abc.abstractmethod
    def matvec(self, v: Tensor) -> Tensor:
        """Return A v `[rows]` for `v` `[columns]`."""

    @abc.abstractmethod
    def rmatvec(self, u: Tensor) -> Tensor:
        """Return Aᵀ u `[columns]` for `u` `[rows]`."""

    def __matmul__(self, v: Tensor) -> Tensor:
        """Return A v for a vector `[columns]`, or A V column by column for a block `[columns, K]`.

        Args:
            v: On the operator's device; other floating dtypes are cast.

        Returns:
            `[rows]` or `[rows, K]`.

        Raises:
            ValueError: The shape does not fit.
        """
        rows, columns = self.shape
        if v.ndim not in {1, 2} or v.shape[0] != columns:
            raise ValueError(
                f"cannot multiply a {rows}x{columns} operator by a tensor of shape {tuple(v.shape)}; "
                f"pass a vector [{columns}] or a block [{columns}, K]"
            )
        v = v.detach().to(self.dtype)
        if v.ndim == 1:
            return self.matvec(v)
        if v.shape[1] == 0:
            return v.new_empty(rows, 0)
        return torch.stack([self.matvec(column) for column in v.unbind(1)], 1)

    def adjoint(self) -> LinearOperator:
        """Return Aᵀ."""
        return _Adjoint(self)

    def quadratic_form(self, vectors: Tensor) -> Tensor:
        """Return V A Vᵀ `[K, K]` for rows V `[K, rows]` of a square A: the curvature along and between directions."""
        products = torch.stack([self.matvec(v) for v in vectors])
        return vectors @ products.T

    def to_dense(self) -> Tensor:
        """Return the matrix `[rows, columns]`, formed from as many products as it has columns."""
        return self @ torch.eye(self.shape[1], dtype=self.dtype, device=self.device)

    def diagonal(self) -> Tensor:
        """Return the exact diagonal `[min(rows, columns)]`, from products and without holding the matrix."""
        rows, columns = self.shape
        out = torch.empty(min(rows, columns), dtype=self.dtype, device=self.device)
        unit = torch.zeros(columns, dtype=self.dtype, device=self.device)
        for i in range(len(out)):
            unit[i] = 1
            out[i] = self.matvec(unit)[i]
            unit[i] = 0
        return out

    def trace(self, samples: int | None = None, *, seed: int = 0) -> Tensor:
        """Return the trace, exactly or by Hutchinson's estimate.

        The estimate is the mean of zᵀAz over vectors z of random signs (Hutchinson 1989): unbiased, with a variance
        of 2 (‖S‖² − ‖diag S‖²) / samples in the Frobenius norm, S the symmetric part of A.

        Args:
            samples: How many z to draw; None for the exact sum of the diagonal.
            seed: Of the draws. The same seed gives the same estimate.

        Returns:
            A tensor without dimensions.

        Raises:
            ValueError: The matrix is not square, or `samples` is not a positive integer.
        """
        rows, columns = self.shape
        if rows != columns:
            raise ValueError(f"a {rows}x{columns} operator has no trace, since it is not square")
        if samples is None:
            return self.diagonal().sum()
        check_samples(samples)
        generator = torch.Generator(self.device).manual_seed(seed)
        total = torch.zeros((), dtype=self.dtype, device=self.device)
        for _ in range(samples):
            signs = torch.randint(0, 2, (1, rows), generator=generator, device=self.device).to(self.dtype) * 2 - 1
            total += self.quadratic_form(signs).squeeze()
        return total / samples

    def to_scipy(self) -> Any:
        """Return a `scipy.sparse.linalg.LinearOperator` with the same products, for scipy's eigen- and linear solvers.

        Vectors go from numpy to the operator's device and back at every product.

        Returns:
            The view, of the operator's shape and dtype (float32 or float64).

        Raises:
            ImportError: scipy is not installed.
        """
        return scipy_view(self)


class LowRank(NamedTuple):
    """A symmetric matrix as UᵀU + diag(d).

    Attributes:
        root: U.
        diagonal: d, a number or `[P]`.
    """

    root: Root
    diagonal: float | Tensor


class SymmetricOperator(LinearOperator):
    """A symmetric P×P matrix that is never formed unless asked for.

    Attributes:
        size: P.
        dtype: Dtype of its vectors.
        device: Device of its vectors.
    """

    size: int

    @property
    def shape(self) -> tuple[int, int]:
        """(P, P)."""
        return self.size, self.size

    def rmatvec(self, u: Tensor) -> Tensor:
        """Return Aᵀ u, which is A u."""
        return self.matvec(u)

    def adjoint(self) -> SymmetricOperator:
        """Return Aᵀ, which is A."""
        return self

    def scaled(self, factor: float) -> SymmetricOperator:
        """Return `factor` times this operator."""
        return self if factor == 1 else _Scaled(self, factor)

    def dots(self, *pairs: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        """Return aᵀb of each pair of the operator's vectors: a scalar each."""
        return tuple(a @ b for a, b in pairs)

    def norm(self, vector: Tensor) -> float:
        """Return the Euclidean norm of one of the operator's vectors."""
        return float(vector.norm())

    def finite(self, vector: Tensor) -> bool:
        """Tell whether all numbers of one of the operator's vectors are finite."""
        return bool(torch.isfinite(vector).all())

    def work(self) -> Work:
        """Return what the forms of the matrix take; of an operator that knows its products only, P and no more."""
        return Work(self.size, 0, 1, Counts(self.size, 0, 1, (), self.size, True), rooted=False, graph=False)

    def low_rank(self) -> LowRank:
        """Return the matrix as UᵀU + diag(d), for solvers that work in the space of the rows of U.

        Raises:
            ValueError: The operator knows its products only.
        """
        name = type(self).__name__
        raise ValueError(f"{name} is no Gram matrix of known rows; use solver=CG(), which needs products only")

    def to_dense(self) -> Tensor:
        """Return the matrix `[P, P]`, formed from P products and made exactly symmetric."""
        dense = super().to_dense()
        return 0.5 * (dense + dense.T)


class _Adjoint(LinearOperator):
    def __init__(self, operator: LinearOperator) -> None:
        self.dtype, self.device = operator.dtype, operator.device
        self._operator = operator

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self._operator.shape
        return columns, rows

    def matvec(self, v: Tensor) -> Tensor:
        return self._operator.rmatvec(v)

    def rmatvec(self, u: Tensor) -> Tensor:
        return self._operator.matvec(u)

    def adjoint(self) -> LinearOperator:
        return self._operator

    def to_dense(self) -> Tensor:
        return self._operator.to_dense().T

    def diagonal(self) -> Tensor:
        return self._operator.diagonal()


class _Scaled(SymmetricOperator):
    def __init__(self, operator: SymmetricOperator, factor: float) -> None:
        self.size, self.dtype, self.device = operator.size, operator.dtype, operator.device
        self._operator, self._factor = operator, factor

    def matvec(self, v: Tensor) -> Tensor:
        return self._factor * self._operator.matvec(v)

    def quadratic_form(self, vectors: Tensor) -> Tensor:
        return self._factor * self._operator.quadratic_form(vectors)

    def low_rank(self) -> LowRank:
        root, diagonal = self._operator.low_rank()
        if self._factor < 0:
            return super().low_rank()
        return LowRank(root.scaled(self._factor**0.5), self._factor * diagonal)

    def work(self) -> Work:
        return self._operator.work()

    def to_dense(self) -> Tensor:
        return self._factor * self._operator.to_dense()

    def diagonal(self) -> Tensor:
        return self._factor * self._operator.diagonal()


def check_samples(samples: int) -> None:
    """Raise a ValueError unless `samples` is a number of random draws."""
    if not isinstance(samples, int) or isinstance(samples, bool) or samples < 1:
        raise ValueError(f"samples={samples!r} must be a positive integer, the number of random draws")


def trace_model(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor],
    inputs: Any,
    targets: Any,
    parameters: ParameterVector,
    keep_value: Callable[[Path], bool] = lambda _: True,
) -> Trace:
    """Compute `loss_fn(model(inputs), targets)` and keep what a cut needs to know.

    Args:
        model: A module.
        loss_fn: Takes what the model returned, and `targets`; returns a scalar.
        inputs: A tensor, a tuple of positional arguments, or a dict of keyword arguments.
        targets: Passed on to `loss_fn`.
        parameters: The parameters.
        keep_value: At which paths of the tree of calls to keep the values of outputs.

    Returns:
        The loss with its graph and its calls.

    Raises:
        ValueError: The loss is no scalar tensor with a graph.
    """
    tree = CallTree(Owners(parameters), parameters.device, lambda _: True, keep_value)
    traced = trace_loss(lambda: loss_fn(call_model(model, inputs), targets), tree)
    check_loss(traced.loss, model)
    with torch.enable_grad():
        traced.loss = traced.loss.clone()  # a mean may live in the memory of what it was taken of
    return traced


def check_loss(loss: Any, model: nn.Module) -> None:
    """Raise a ValueError unless `loss`, made of what `model` returned, is a scalar with a graph."""
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        found = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)
        raise ValueError(f"loss_fn returned {found}, not a scalar tensor; reduce it first, for example loss.mean()")
    if not loss.requires_grad:
        raise ValueError(
            f"the loss does not depend on the parameters through what {type(model).__name__} returned; pass it to "
            "loss_fn without detach()"
        )


def cut_trace(traced: Trace, parameters: ParameterVector, complaint: str | None = None) -> Cut:
    """Find where the network ends and the loss begins.

    Args:
        traced: A loss and its calls.
        parameters: The parameters.
        complaint: What to say where there is no such place; None for what the search found.

    Returns:
        The cut.

    Raises:
        ValueError: The loss has no second derivative in any output of a module.
    """
    place = find_cut(traced, parameters)
    if not place.places:
        raise ValueError(complaint or f"{place.warning}. For the exact Hessian as an operator use Hessian.from_loss")
    return make_cut(traced, parameters, place)
