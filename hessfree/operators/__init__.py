"""Curvature matrices as operators: `A @ v`, `A.to_dense()`, `A.diagonal()`, `A.trace()`, `A.to_scipy()`."""

from hessfree.operators.averaged import Averaged
from hessfree.operators.base import LinearOperator, LowRank, SymmetricOperator
from hessfree.operators.deferred import Deferred
from hessfree.operators.empirical_fisher import EmpiricalFisher
from hessfree.operators.factored_root import FactoredRoot
from hessfree.operators.fisher import MonteCarloFisher
from hessfree.operators.gauss_newton import GaussNewton
from hessfree.operators.hessian import Hessian
from hessfree.operators.jacobian_gram import JacobianGram
from hessfree.operators.root import ProductRoot, Root
from hessfree.operators.sharded import Sharded
from hessfree.operators.work import Work

__all__ = [
    "Averaged",
    "Deferred",
    "EmpiricalFisher",
    "FactoredRoot",
    "GaussNewton",
    "Hessian",
    "JacobianGram",
    "LinearOperator",
    "LowRank",
    "MonteCarloFisher",
    "ProductRoot",
    "Root",
    "Sharded",
    "SymmetricOperator",
    "Work",
]
