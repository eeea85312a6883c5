"""What the products are taken of: networks, batches and losses, each with a name."""

import copy
import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from experiments.benchmark.products.networks import ConvNet, Transformer
from experiments.environment import UsageError
from experiments.models import ToyMLP


@dataclass(frozen=True, eq=False)
class Workload:
    """One network with its batch.

    Attributes:
        name: What the command line calls it.
        title: What tables call it.
        model: The network; all of its parameters require grad.
        loss: `nn.MSELoss()` or `nn.CrossEntropyLoss()`, means over the batch.
        inputs: What `model` takes.
        targets: What `loss` takes besides the outputs.
    """

    name: str
    title: str
    model: nn.Module
    loss: nn.Module
    inputs: Tensor
    targets: Tensor

    def __post_init__(self) -> None:
        """Check what every implementation relies on.

        Raises:
            ValueError: If the loss is another one, or a parameter is frozen.
        """
        if type(self.loss) not in {nn.MSELoss, nn.CrossEntropyLoss} or self.loss.reduction != "mean":
            raise ValueError(f"loss={self.loss} is not served: pass nn.MSELoss() or nn.CrossEntropyLoss(), as means")
        frozen = [name for name, parameter in self.model.named_parameters() if not parameter.requires_grad]
        if frozen:
            raise ValueError(f"{frozen[0]} does not require grad, and peers differ on frozen ones: make all require it")

    @functools.cached_property
    def parameters(self) -> list[nn.Parameter]:
        """The parameters in the order of flat vectors `[P]`."""
        return list(self.model.parameters())

    @property
    def size(self) -> int:
        """P."""
        return sum(parameter.numel() for parameter in self.parameters)

    @property
    def device(self) -> torch.device:
        """Where all tensors are."""
        return self.parameters[0].device

    def split(self, v: Tensor) -> list[Tensor]:
        """Return views of `v` `[P]`, one of the shape of each parameter."""
        pieces = v.split([parameter.numel() for parameter in self.parameters])
        return [piece.view_as(parameter) for piece, parameter in zip(pieces, self.parameters, strict=True)]

    def double(self) -> "Workload":
        """Return an independent copy in float64 on the CPU, which every machine has."""
        inputs = self.inputs.cpu().double() if self.inputs.is_floating_point() else self.inputs.cpu()
        targets = self.targets.cpu().double() if self.targets.is_floating_point() else self.targets.cpu()
        model = copy.deepcopy(self.model).cpu().double()
        return Workload(self.name, self.title, model, self.loss, inputs, targets)

    def move(self, generator: torch.Generator) -> None:
        """Move the parameters in place by a thousandth of their size, as a step does."""
        with torch.no_grad():
            for parameter in self.parameters:
                noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
                parameter.add_(noise.to(parameter.device) * (1e-3 * parameter.square().mean().sqrt()))

    def vector(self, generator: torch.Generator) -> Tensor:
        """Draw a fresh `[P]` vector from the standard normal distribution."""
        return torch.randn(self.size, generator=generator, dtype=self.parameters[0].dtype).to(self.device)


def _seed(small: bool) -> tuple[str, nn.Module, nn.Module, Tensor, Tensor]:
    n = 64 if small else 4096
    model = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))
    return f"seed net 4-64-64-1, N {n}", model, nn.MSELoss(), torch.randn(n, 4), torch.randn(n, 1)


def _toy(dim: int, w: int, n: int, small: bool) -> tuple[str, nn.Module, nn.Module, Tensor, Tensor]:
    n = 32 if small else n
    model = ToyMLP(dim, w=w, n_hidden=3, time_varying=dim == 2)
    inputs = torch.randn(n, dim + int(model.time_varying))
    return f"ToyMLP {dim}, w {w}, N {n}", model, nn.MSELoss(), inputs, torch.randn(n, dim)


def _conv(small: bool) -> tuple[str, nn.Module, nn.Module, Tensor, Tensor]:
    n = 8 if small else 128
    targets = torch.randint(10, (n,))
    return f"conv net 3x32x32, N {n}", ConvNet(), nn.CrossEntropyLoss(), torch.randn(n, 3, 32, 32), targets


def _transformer(small: bool) -> tuple[str, nn.Module, nn.Module, Tensor, Tensor]:
    n, length, layers = (2, 8, 1) if small else (16, 64, 2)
    tokens, targets = torch.randint(64, (n, length)), torch.randint(64, (n * length,))
    model = Transformer(length=length, layers=layers)
    return f"transformer {layers}x128, {n}x{length} tokens", model, nn.CrossEntropyLoss(), tokens, targets


def _resnet(small: bool) -> tuple[str, nn.Module, nn.Module, Tensor, Tensor]:
    # BatchNorm takes the statistics of the batch, as in train mode; its running averages are switched off: products
    # do not depend on them, and functional libraries cannot update them
    from torchvision.models.resnet import BasicBlock, ResNet

    n, blocks = (8, 1) if small else (32, 2)
    norm = functools.partial(nn.BatchNorm2d, track_running_stats=False)
    model = ResNet(BasicBlock, [blocks] * 4, num_classes=10, norm_layer=norm).train()
    targets = torch.randint(10, (n,))
    return f"ResNet-{2 + 8 * blocks} 3x32x32, N {n}", model, nn.CrossEntropyLoss(), torch.randn(n, 3, 32, 32), targets


_MAKERS: dict[str, Callable[[bool], tuple[str, nn.Module, nn.Module, Tensor, Tensor]]] = {
    "seed": _seed,
    "toy784": functools.partial(_toy, 784, 64, 256),
    "toy2": functools.partial(_toy, 2, 64, 256),
    "conv": _conv,
    "transformer": _transformer,
    "toy784-wide": functools.partial(_toy, 784, 512, 1024),
    "resnet18": _resnet,
}
NAMES = tuple(_MAKERS)


def make(name: str, device: torch.device | str = "cpu", small: bool = False) -> Workload:
    """Make a workload from its own seed; the global generator is left as it was.

    Args:
        name: One of `NAMES`.
        device: Where it is to live.
        small: A batch of a few samples, which shows that everything runs.

    Returns:
        The workload in float32.

    Raises:
        UsageError: If torchvision is missing.
    """
    if name == "resnet18" and importlib.util.find_spec("torchvision") is None:
        raise UsageError("resnet18 needs torchvision, which is not installed; run: pip install torchvision")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        title, model, loss, inputs, targets = _MAKERS[name](small)
    return Workload(name, title, model.to(device), loss, inputs.to(device), targets.to(device))
