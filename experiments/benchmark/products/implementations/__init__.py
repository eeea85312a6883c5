"""Everything that is measured, in the order of the table."""

from experiments.benchmark.products.implementations.asdl_fisher import Asdfghjkl
from experiments.benchmark.products.implementations.backpack_ggn import Backpack
from experiments.benchmark.products.implementations.base import Product, UnsupportedError
from experiments.benchmark.products.implementations.curvlinops_ggn import Curvlinops
from experiments.benchmark.products.implementations.eigenthings_ggn import HessianEigenthings
from experiments.benchmark.products.implementations.gradient import Gradient
from experiments.benchmark.products.implementations.hessfree_operator import (
    Hessfree,
    HessfreeFunctional,
    HessfreeGraph,
)
from experiments.benchmark.products.implementations.jax_forms import JaxAnew, JaxDoubleReverse, JaxLinearize
from experiments.benchmark.products.implementations.layerwise import LayerWise, MatrixProducts
from experiments.benchmark.products.implementations.torch_func import JvpAnew, LinearizeAnew

OURS = Hessfree.name
GRADIENT = Gradient.name
FLOOR = MatrixProducts.name
JAX = (JaxAnew.name, JaxLinearize.name, JaxDoubleReverse.name)
CURVLINOPS = Curvlinops.name
IMPLEMENTATIONS: dict[str, type[Product]] = {
    kind.name: kind
    for kind in (
        Hessfree,
        HessfreeGraph,
        HessfreeFunctional,
        JvpAnew,
        LinearizeAnew,
        Curvlinops,
        Backpack,
        Asdfghjkl,
        HessianEigenthings,
        JaxAnew,
        JaxLinearize,
        JaxDoubleReverse,
        LayerWise,
        MatrixProducts,
        Gradient,
    )
}

__all__ = ["CURVLINOPS", "FLOOR", "GRADIENT", "IMPLEMENTATIONS", "JAX", "OURS", "Product", "UnsupportedError"]
