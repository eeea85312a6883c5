"""Solvers of the damped linear system: each knows products and vectors, and no networks."""

from hessfree.solvers.auto import AutoSolver
from hessfree.solvers.base import Map, Solution, Solver, Status
from hessfree.solvers.cg import CG
from hessfree.solvers.dense import DenseCholesky
from hessfree.solvers.forcing import EisenstatWalker, Forcing, RootGradientNorm
from hessfree.solvers.gram import GramCholesky
from hessfree.solvers.on_shards import OnShards

__all__ = [
    "CG",
    "AutoSolver",
    "DenseCholesky",
    "EisenstatWalker",
    "Forcing",
    "GramCholesky",
    "Map",
    "OnShards",
    "RootGradientNorm",
    "Solution",
    "Solver",
    "Status",
    "OnShards",
]
