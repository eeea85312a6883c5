"""The product of a perceptron written by hand, layer by layer, and its matrix products alone: the floor."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from experiments.benchmark.products.implementations.base import Product, UnsupportedError
from experiments.benchmark.products.workloads import Workload


def _tanh_slope(z: Tensor) -> Tensor:
    return 1 - torch.tanh(z).square()


def _selu_slope(z: Tensor) -> Tensor:
    scale, alpha = 1.0507009873554804934193349852946, 1.6732632423543772848170429916717
    return torch.where(z > 0, scale, scale * alpha * z.exp())


_SLOPES = {nn.Tanh: _tanh_slope, nn.SELU: _selu_slope}


@dataclass
class _Kept:
    """What a set-up keeps.

    Attributes:
        inputs: Of each layer, `[N, fan_in]`.
        slopes: Of each activation, `[N, fan_out]`.
        tangents: Room for Jv behind each layer.
        cotangents: Room for what is pulled back to each layer's input.
        out: Room for the product, `[P]`.
    """

    inputs: list[Tensor]
    slopes: list[Tensor]
    tangents: list[Tensor]
    cotangents: list[Tensor]
    out: Tensor


class LayerWise(Product):
    """Forward and backward through the layers with one matrix product each where calculus allows it.

    Activations and slopes are kept by the set-up, and all results go into buffers that stay.
    """

    name = "layer-wise by hand"

    def __init__(self, workload: Workload) -> None:
        """Read the layers.

        Args:
            workload: What to multiply by.

        Raises:
            UnsupportedError: If it is no perceptron with the mean of squares as its loss.
        """
        super().__init__(workload)
        parts = [part for part in workload.model.modules() if not list(part.children())]
        self._layers = [part for part in parts if isinstance(part, nn.Linear)]
        self._acts = [part for part in parts if type(part) in _SLOPES]
        known = self._layers == parts[::2] and self._acts == parts[1::2] and len(parts) % 2 == 1
        if not (known and isinstance(workload.loss, nn.MSELoss)):
            raise UnsupportedError("written for perceptrons and squares alone")
        self._scale = 2 / workload.targets.numel()

    def setup(self) -> None:
        """Evaluate the network, and keep the inputs of all layers and the slopes of all activations."""
        with torch.no_grad():
            x, inputs, slopes, tangents = self.workload.inputs, [], [], []
            for index, layer in enumerate(self._layers):
                inputs.append(x)
                z = layer(x)
                tangents.append(torch.empty_like(z))
                if index < len(self._acts):
                    x = self._acts[index](z)
                    slopes.append(_SLOPES[type(self._acts[index])](z))
            cotangents = [torch.empty_like(x) for x in inputs]
            out = self.workload.parameters[0].new_empty(self.workload.size)
        self.kept = _Kept(inputs, slopes, tangents, cotangents, out)

    @torch.no_grad()
    def product(self, v: Tensor) -> Tensor:
        """Return G v `[P]`, which the next product overwrites."""
        kept, pieces, room = self.kept, self.workload.split(v), self.workload.split(self.kept.out)
        for index, layer in enumerate(self._layers):
            weight, bias, tangent = pieces[2 * index], pieces[2 * index + 1], kept.tangents[index]
            torch.addmm(bias, kept.inputs[index], weight.T, out=tangent)
            if index:
                tangent.addmm_(kept.tangents[index - 1], layer.weight.T)
            if index < len(kept.slopes):
                tangent.mul_(kept.slopes[index])
        back = kept.tangents[-1].mul_(self._scale)
        for index in reversed(range(len(self._layers))):
            torch.mm(back.T, kept.inputs[index], out=room[2 * index])
            torch.sum(back, 0, out=room[2 * index + 1])
            if index:
                back = torch.mm(back, self._layers[index].weight, out=kept.cotangents[index])
                back.mul_(kept.slopes[index - 1])
        return kept.out


class MatrixProducts(LayerWise):
    """The matrix products of the layer-wise product and nothing else, with the same operands and buffers."""

    name = "its GEMMs alone"
    is_product = False

    def setup(self) -> None:
        """Evaluate the network, and leave nothing undefined where the biases' shares would go."""
        super().setup()
        self.kept.out.zero_()

    @torch.no_grad()
    def product(self, v: Tensor) -> Tensor:
        """Return the products `[P]`, zero at the biases."""
        kept, pieces, room = self.kept, self.workload.split(v), self.workload.split(self.kept.out)
        for index, layer in enumerate(self._layers):
            torch.mm(kept.inputs[index], pieces[2 * index].T, out=kept.tangents[index])
            if index:
                kept.tangents[index].addmm_(kept.tangents[index - 1], layer.weight.T)
        back = kept.tangents[-1]
        for index in reversed(range(len(self._layers))):
            torch.mm(back.T, kept.inputs[index], out=room[2 * index])
            if index:
                back = torch.mm(back, self._layers[index].weight, out=kept.cotangents[index])
        return kept.out
