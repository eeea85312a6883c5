"""Approximations of the curvature whose inverse is cheap."""

from hessfree.preconditioners.base import Preconditioner, Sample, State
from hessfree.preconditioners.empirical_fisher import EmpiricalFisherDiagonal
from hessfree.preconditioners.identity import Identity
from hessfree.preconditioners.jacobi import Jacobi
from hessfree.preconditioners.kfac import KFAC
from hessfree.preconditioners.moments import InputMoments
from hessfree.preconditioners.nystrom import Nystrom
from hessfree.preconditioners.woodbury import Woodbury

__all__ = [
    "KFAC",
    "EmpiricalFisherDiagonal",
    "Identity",
    "InputMoments",
    "Jacobi",
    "Nystrom",
    "Preconditioner",
    "Sample",
    "State",
    "Woodbury",
]
