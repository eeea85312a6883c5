"""Approximations of the curvature whose inverse is cheap."""

from hessfree.preconditioners.base import Preconditioner, Sample, State
from hessfree.preconditioners.identity import Identity
from hessfree.preconditioners.kfac import KFAC
from hessfree.preconditioners.woodbury import Woodbury

__all__ = ["KFAC", "Identity", "Preconditioner", "Sample", "State", "Woodbury"]
