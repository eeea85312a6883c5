"""The network's outputs with their graph: where rows of Jacobians are pulled back from."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hessfree.recording import Output, autocast_as, leaf_hooks_off, twice_differentiable
from hessfree.vectors import FlatSpace, ParameterVector


@dataclasses.dataclass(frozen=True, eq=False)
class OutputGraph:
    """z as a function of the parameters, by its autograd graph, which must stay alive.

    Attributes:
        parameters: The parameters.
        outputs: z.
        space: The flat space `[Z]` of z.
        seed: For random vectors that tell samples apart.
    """

    parameters: ParameterVector
    outputs: Sequence[Output]
    space: FlatSpace
    seed: int = 0

    def generator(self) -> torch.Generator:
        """Return a generator on the outputs' device, always in the same state."""
        return torch.Generator(self.space.device).manual_seed(self.seed)

    def pull_back(
        self, inputs: Sequence[Any], u: Tensor, outputs: Sequence[int] | None = None, batched: bool = False
    ) -> list[Tensor | None]:
        """Return the gradients of uᵀz at `inputs`.

        Args:
            inputs: Tensors or edges of the graph.
            u: `[Z]`; or `[R, Z]` if `batched`.
            outputs: Numbers of the outputs that u is not zero at; None for all. The graphs of others are not entered.
            batched: Whether to pull R vectors back at once.

        Returns:
            One tensor an input, with a leading R if `batched`; None where z does not depend on it.
        """
        chosen = range(len(self.space.shapes)) if outputs is None else outputs
        pieces = u.split(self.space.numels, -1)
        weights = [pieces[k].reshape(*u.shape[:-1], *self.space.shapes[k]).to(self.space.dtypes[k]) for k in chosen]
        edges = [self.outputs[k].edge for k in chosen]
        with twice_differentiable(), autocast_as((), self.space.device), leaf_hooks_off(self.parameters.params):
            found = torch.autograd.grad(
                edges, inputs, weights, retain_graph=True, allow_unused=True, is_grads_batched=batched
            )
        return list(found)
