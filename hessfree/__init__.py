"""Hessian-free optimization for PyTorch: swap the optimizer, keep the training loop.

```python
optimizer = hessfree.HessianFree(model.parameters())
for x, y in loader:
    def closure():
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        return loss
    optimizer.step(closure)
```
"""

from hessfree.damping import ConstantDamping, LevenbergMarquardt
from hessfree.line_search import Armijo, FullStep
from hessfree.linearization import linearize
from hessfree.momentum import QuadraticModelMomentum
from hessfree.operators import EmpiricalFisher, GaussNewton, Hessian, JacobianGram, MonteCarloFisher
from hessfree.optimizer import HessianFree
from hessfree.preconditioners import KFAC, EmpiricalFisherDiagonal, Identity, InputMoments, Jacobi, Nystrom, Woodbury
from hessfree.recording import is_replaying, mark_outputs
from hessfree.report import StepReport
from hessfree.solvers import CG, AutoSolver, DenseCholesky, EisenstatWalker, GramCholesky, RootGradientNorm

__version__ = "0.1.0"

__all__ = [
    "CG",
    "KFAC",
    "Armijo",
    "AutoSolver",
    "ConstantDamping",
    "DenseCholesky",
    "EisenstatWalker",
    "EmpiricalFisher",
    "EmpiricalFisherDiagonal",
    "FullStep",
    "GaussNewton",
    "GramCholesky",
    "Hessian",
    "HessianFree",
    "Identity",
    "InputMoments",
    "Jacobi",
    "JacobianGram",
    "LevenbergMarquardt",
    "MonteCarloFisher",
    "Nystrom",
    "QuadraticModelMomentum",
    "RootGradientNorm",
    "StepReport",
    "Woodbury",
    "is_replaying",
    "linearize",
    "mark_outputs",
]
