"""Muon for matrices, AdamW for the rest."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from experiments.optimizers.first_order import FirstOrderSettings


@dataclass(frozen=True, kw_only=True)
class MuonSettings(FirstOrderSettings):
    """torch.optim.Muon (Jordan et al. 2024) on weight matrices, AdamW on all else, one learning rate for both.

    Muon's steps are scaled to the root mean square of AdamW's (Liu et al. 2025, arXiv 2502.16982, sec. 2.2), so that
    one rate suits both. A convolution's kernel is the matrix `[out, in · height · width]`, as for its author; vectors
    are AdamW's. The first and last layers of these small networks are Muon's as well.

    Attributes:
        weight_decay: Share of the weights that a step of rate 1 takes away.
    """

    def _at(self, lr: float, parameters: Iterable[nn.Parameter]) -> Optimizer:
        params = list(parameters)
        rate: dict[str, Any] = {"lr": lr, "weight_decay": self.weight_decay}
        parts: list[Optimizer] = []
        # torch's Muon takes matrices alone: of a kernel it gets one that shares its memory
        matrix_of = {p: nn.Parameter(p.detach().view(len(p), -1)) for p in params if p.dim() > 2}
        if matrices := [matrix_of.get(p, p) for p in params if p.dim() > 1]:
            parts.append(torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw", **rate))
        if rest := [p for p in params if p.dim() <= 1]:
            parts.append(torch.optim.AdamW(rest, **rate))
        return Together(parts, matrix_of)


class Together(Optimizer):
    """Several optimizers, each with parameters of its own, that step as one, and are saved and loaded as one.

    Attributes:
        param_groups: Those of all parts: a rate that is changed here is changed there.
        state: That of all parts, by parameter.
    """

    def __init__(self, parts: Iterable[Optimizer], shared: Mapping[nn.Parameter, nn.Parameter] | None = None) -> None:
        """Take the parts together.

        Args:
            parts: The optimizers.
            shared: For parameters of the network what a part has in their place: the same memory in another shape.
        """
        self._parts = list(parts)
        self._shared = dict(shared or {})
        groups = [group for part in self._parts for group in part.param_groups]
        super().__init__([p for group in groups for p in group["params"]], {})
        self.param_groups = groups
        for part in self._parts:
            self.state.update(part.state)
        self._share()

    def _share(self) -> None:
        """Let the parts work on the groups and the state that are shown, saved and loaded here."""
        place = 0
        for part in self._parts:
            end = place + len(part.param_groups)
            part.param_groups, part.state = self.param_groups[place:end], self.state
            place = end

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where another was that was made of the same parts.

        Args:
            state_dict: From its `state_dict`.
        """
        super().load_state_dict(state_dict)  # makes new groups and a new state, which no part knows
        self._share()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step with each part.

        Args:
            closure: Evaluates the loss and its gradient, once; None: the gradient is there.

        Returns:
            The loss; None without a closure.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for parameter, other in self._shared.items():
            other.grad = None if parameter.grad is None else parameter.grad.reshape(other.shape)
        for part in self._parts:
            part.step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of all parameters, also of those that a part has in another shape.

        Args:
            set_to_none: As for any optimizer of torch.
        """
        super().zero_grad(set_to_none)
        for parameter in self._shared:
            if set_to_none:
                parameter.grad = None
            elif parameter.grad is not None:
                parameter.grad.zero_()
