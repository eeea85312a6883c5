"""curvlinops: `GGNLinearOperator`, made once; it reads the parameters at every product."""

from torch import Tensor

from experiments.benchmark.products.implementations.base import Product
from experiments.benchmark.products.workloads import Workload


class Curvlinops(Product):
    """The operator on one batch, without its optional check that products repeat."""

    name = "curvlinops"
    package = "curvlinops"
    requirement = "curvlinops-for-pytorch"

    def __init__(self, workload: Workload) -> None:
        """Build the operator.

        Args:
            workload: What to multiply by.
        """
        super().__init__(workload)
        from curvlinops import GGNLinearOperator

        self._operator = GGNLinearOperator(
            workload.model,
            workload.loss,
            workload.parameters,
            [(workload.inputs, workload.targets)],
            check_deterministic=False,
            num_data=len(workload.inputs),
        )

    def product(self, v: Tensor) -> Tensor:
        """Return G v `[P]`."""
        return self._operator @ v
