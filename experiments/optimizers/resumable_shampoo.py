"""Shampoo whose state is made of tensors. Imports pytorch_optimizer, and is itself imported when Shampoo is built."""

from typing import Any

import torch
from pytorch_optimizer import ScalableShampoo
from torch import Tensor, nn

_OBJECTS = ("pre_conditioner", "graft")  # entries of a parameter's state that are objects of the package


class ResumableShampoo(ScalableShampoo):
    """`ScalableShampoo`, its state saved as tensors.

    The package keeps objects in the state, which a file can hold but `torch.load(weights_only=True)` refuses, with all
    else that is in the file. All that changes in them are tensors; the rest follows from the settings.
    """

    def state_dict(self) -> dict[str, Any]:
        """Give the state, each of the package's objects as the tensors that it holds.

        Returns:
            Plain containers of tensors and numbers; the tensors are the live ones.
        """
        content = super().state_dict()
        content["state"] = {
            place: {key: _tensors_of(value) if key in _OBJECTS else value for key, value in state.items()}
            for place, state in content["state"].items()
        }
        return content

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where another with the same settings and parameters was.

        Args:
            state_dict: From its `state_dict`.
        """
        owners = [(group, p) for group in self.param_groups for p in group["params"]]
        content = {}
        for place, saved in state_dict["state"].items():
            fresh = self._fresh_state(*owners[place])
            for key in _OBJECTS:
                _give(fresh[key], saved[key])
            content[place] = saved | {key: fresh[key] for key in _OBJECTS}
        super().load_state_dict(state_dict | {"state": content})

    def _fresh_state(self, group: dict[str, Any], parameter: nn.Parameter) -> dict[str, Any]:
        """Let the package make a parameter's state, as it does at the first step: where there is a gradient."""
        self.state.pop(parameter, None)
        gradient = parameter.grad
        parameter.grad = torch.zeros_like(parameter)
        self.init_group(group | {"params": [parameter]})
        parameter.grad = gradient
        return self.state[parameter]


def _tensors_of(thing: object) -> dict[str, Any]:
    """The attributes that are tensors, or lists of them."""
    found: dict[str, Any] = {}
    for name, value in vars(thing).items():
        if isinstance(value, Tensor):
            found[name] = value
        elif isinstance(value, list) and value and all(isinstance(one, Tensor) for one in value):
            found[name] = list(value)
    return found


def _give(thing: object, saved: dict[str, Any]) -> None:
    """Replace those attributes by copies, on the device of what was there."""
    for name, value in saved.items():
        before = getattr(thing, name)
        if isinstance(value, Tensor):
            setattr(thing, name, value.to(before.device, copy=True))
        else:
            pairs = zip(value, before, strict=True)
            setattr(thing, name, [one.to(old.device, copy=True) for one, old in pairs])
