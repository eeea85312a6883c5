"""hessian-eigenthings: `GGNOperator`, made once; it reads the parameters at every product."""

from torch import Tensor

from experiments.benchmark.products.implementations.base import Product
from experiments.benchmark.products.workloads import Workload


class HessianEigenthings(Product):
    """The operator on one batch, without the sum over a data set."""

    name = "hessian-eigenthings"
    package = "hessian_eigenthings"
    requirement = "hessian-eigenthings"

    def __init__(self, workload: Workload) -> None:
        """Build the operator.

        Args:
            workload: What to multiply by.
        """
        super().__init__(workload)
        from hessian_eigenthings import GGNOperator
        from hessian_eigenthings.loss_fns import supervised_forward, supervised_loss_of_output

        self._operator = GGNOperator(
            workload.model,
            [(workload.inputs, workload.targets)],
            supervised_forward,
            supervised_loss_of_output(workload.loss),
            full_dataset=False,
        )

    def product(self, v: Tensor) -> Tensor:
        """Return G v `[P]`."""
        return self._operator @ v

    def decode(self, product: Tensor) -> Tensor:
        """Leave the graph behind that its products carry."""
        return product.detach()
