"""asdfghjkl (imported as asdl): the exact Fisher matrix times a vector, from gradients of single samples.

It is the only product with a Gauss-Newton matrix that the library has: one backward pass an output, each of which
keeps `[N, P]` gradients, all of them anew for every product.
"""

from typing import Any

from torch import Tensor, nn

from experiments.benchmark.products.implementations.base import Product, UnsupportedError
from experiments.benchmark.products.workloads import Workload

_MOST_OUTPUTS = 64  # a product of 784 backward passes takes a minute and is of no use to anyone


class Asdfghjkl(Product):
    """`FisherExactCrossEntropy` or `FisherExactMSE`, scaled to the mean loss."""

    name = "asdfghjkl"
    package = "asdl"
    requirement = "asdfghjkl"

    def __init__(self, workload: Workload) -> None:
        """Set the maker up.

        Args:
            workload: What to multiply by.

        Raises:
            UnsupportedError: If its gradients of single samples do not exist or are too many.
        """
        super().__init__(workload)
        _check(workload.model)
        from asdl.fisher import FisherConfig, get_fisher_maker
        from asdl.matrices import FISHER_EXACT, SHAPE_FULL

        squares = isinstance(workload.loss, nn.MSELoss)
        outputs = workload.targets.shape[-1] if squares else 0
        if outputs > _MOST_OUTPUTS:
            raise UnsupportedError(f"its exact Fisher matrix needs {outputs} backward passes a product")
        self._shape = SHAPE_FULL
        config = FisherConfig(
            fisher_type=FISHER_EXACT,
            fisher_shapes=[SHAPE_FULL],
            loss_type="mse" if squares else "cross_entropy",
            data_size=len(workload.inputs),
            scale=2 / outputs if squares else 1.0,  # its squares come without the 2 of the second derivative
        )
        self._maker = get_fisher_maker(workload.model, config)
        self._maker.setup_logits_repr(self._maker.setup_model_call(workload.model, workload.inputs))

    def encode(self, v: Tensor) -> Any:
        """Wrap the vector."""
        from asdl.vector import ParamVector

        return ParamVector(self.workload.parameters, v)

    def product(self, v: Any) -> Any:
        """Return F v as a ParamVector."""
        self._maker.forward_and_backward(fvp=True, vec=v)
        return self._maker.load_fvp(self._shape)

    def decode(self, product: Any) -> Tensor:
        """Unwrap the answer."""
        return product.get_flatten_vector()


def _check(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise UnsupportedError("samples have no gradients of their own under statistics of the batch")
        if isinstance(module, nn.Embedding):
            raise UnsupportedError("it takes the gradient of each token for that of a sample")
