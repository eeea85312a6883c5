"""How much work the forms of a curvature matrix are, in numbers that shapes alone decide."""

from __future__ import annotations

import dataclasses

from hessfree.rows import Counts


@dataclasses.dataclass(frozen=True)
class Work:
    """Sizes of UᵀU `[P, P]` for U `[R, P]`.

    Attributes:
        size: P.
        rows: R: samples times outputs; 0 where they are not known.
        samples: N.
        counts: Of the network.
        rooted: Whether the matrix is known as UᵀU plus a diagonal.
        graph: Whether rows of U come from one backward pass for an output of all samples, rather than a product each.
    """

    size: int
    rows: int
    samples: int
    counts: Counts
    rooted: bool
    graph: bool

    @property
    def columns(self) -> int:
        """Outputs a sample, at least one."""
        return max(1, self.rows // max(self.samples, 1))
