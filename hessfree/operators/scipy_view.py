"""An operator as scipy sees it, for `scipy.sparse.linalg`: eigsh, svds, cg, lobpcg."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from hessfree.operators.base import LinearOperator


def scipy_view(operator: LinearOperator) -> Any:
    """Return a `scipy.sparse.linalg.LinearOperator` with the products of `operator`.

    Args:
        operator: Any operator.

    Returns:
        The view; it takes and returns numpy arrays in the operator's dtype.

    Raises:
        ImportError: scipy is not installed.
    """
    try:
        from scipy.sparse.linalg import LinearOperator as ScipyOperator
    except ImportError as error:
        raise ImportError(
            "to_scipy() needs scipy, which hessfree itself does without; install it by pip install 'hessfree[scipy]', "
            "or use the operator's own @, to_dense(), diagonal() and trace()"
        ) from error
    adjoint = operator.adjoint()

    def vector(of: LinearOperator) -> Any:
        # scipy hands vectors over as [n] or [n, 1]
        return lambda x: _to_numpy(of @ _to_tensor(x, of).reshape(-1))

    def block(of: LinearOperator) -> Any:
        return lambda x: _to_numpy(of @ _to_tensor(x, of))

    return ScipyOperator(
        operator.shape,
        matvec=vector(operator),
        rmatvec=vector(adjoint),
        matmat=block(operator),
        rmatmat=block(adjoint),
        dtype=str(operator.dtype).removeprefix("torch."),
    )


def _to_tensor(x: Any, operator: LinearOperator) -> Tensor:
    tensor = torch.from_numpy(x.copy())  # scipy's arrays may be read-only, or run backwards
    if tensor.is_complex():
        raise ValueError(f"the operator is real, but was multiplied by an array of {x.dtype}; multiply by its parts")
    return tensor.to(operator.dtype).to(operator.device)  # cast on the CPU: some devices have no float64


def _to_numpy(t: Tensor) -> Any:
    return t.cpu().numpy()
