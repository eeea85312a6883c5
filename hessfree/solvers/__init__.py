"""Solvers of the damped linear system: each knows products and vectors, and no networks."""

from hessfree.solvers.base import Map, Solution, Solver, Status
from hessfree.solvers.cg import CG
from hessfree.solvers.dense import DenseCholesky

__all__ = ["CG", "DenseCholesky", "Map", "Solution", "Solver", "Status"]
