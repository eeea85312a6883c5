"""A flat vector of which each rank holds one part."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from hessfree.distributed.ranks import Ranks


class Shards:
    """Equal parts of a vector `[P]`, one a rank in their order; the last is padded with zeros.

    Attributes:
        each: Numbers of a part, P / ranks rounded up.
    """

    def __init__(self, size: int, ranks: Ranks) -> None:
        """Divide vectors of `size` numbers among `ranks`."""
        self.each = -(-size // ranks.size)
        self._size, self._ranks = size, ranks

    def take(self, vector: Tensor) -> Tensor:
        """Return a copy of this rank's part `[each]` of `vector` `[P]`."""
        first = self._ranks.rank * self.each
        own = vector[first : first + self.each]
        return F.pad(own, (0, self.each - len(own))) if len(own) < self.each else own.clone()

    def whole(self, part: Tensor) -> Tensor:
        """Return the vector `[P]` from the parts `[each]` of all ranks; one message of `each` numbers from each."""
        return self._ranks.gather(part)[: self._size]

    def scattered_mean(self, vector: Tensor) -> Tensor:
        """Return this rank's part `[each]` of the mean of the ranks' vectors `[P]`; one message of P numbers."""
        padding = self.each * self._ranks.size - len(vector)
        padded = F.pad(vector, (0, padding)) if padding else vector
        return self._ranks.scatter_sum(padded).div_(self._ranks.size)

    def dots(self, *pairs: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        """Return aᵀb for pairs of parts, a scalar each; one message of as many numbers."""
        return self._ranks.sum(torch.stack([a @ b for a, b in pairs])).unbind()

    def finite(self, part: Tensor) -> bool:
        """Tell whether all numbers of all parts are finite; one message."""
        rotten = (~torch.isfinite(part)).any().to(part.dtype).reshape(1)
        return not bool(self._ranks.sum(rotten).any())
