"""Curvature matrices as operators: `A @ v`, `A.to_dense()`, `A.diagonal()`."""

from hessfree.operators.base import LinearOperator
from hessfree.operators.deferred import Deferred
from hessfree.operators.gauss_newton import GaussNewton
from hessfree.operators.hessian import Hessian

__all__ = ["Deferred", "GaussNewton", "Hessian", "LinearOperator"]
