"""How far two right evaluations of the same products may differ."""

from __future__ import annotations

import torch

_TF32 = 2.0**-10  # numbers of ten bits are multiplied, and summed in float32
_AMPERE = 8  # the first generation of CUDA devices that has it


def unit(dtype: torch.dtype, device: torch.device) -> float:
    """Return the relative rounding of products of matrices, and of convolutions.

    Two evaluations in another order differ by a rounding of their sums. Where TF32 is on, which it is for convolutions
    on newer CUDA devices unless it was switched off, such a difference may carry a factor over to the next number of
    ten bits, and two right answers differ by much more than float32's own precision.

    Args:
        dtype: Of the factors.
        device: Where they are multiplied.

    Returns:
        The dtype's `eps`, or that of TF32 where float32 is multiplied so.
    """
    eps = torch.finfo(dtype).eps
    return max(eps, _TF32) if dtype == torch.float32 and device.type == "cuda" and _tf32(device) else eps


def _tf32(device: torch.device) -> bool:
    if torch.version.cuda is None or torch.cuda.get_device_capability(device)[0] < _AMPERE:
        return False
    try:
        return torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32
    except RuntimeError:  # set by both of torch's interfaces, which it then refuses to read
        return True
