from __future__ import annotations

import torch
from torch import nn

from hessfree import Identity
from hessfree.vectors import ParameterVector
from tests.preconditioners.oracles import sample_of


def test_learns_nothing_and_leaves_the_solver_alone() -> None:
    torch.manual_seed(0)
    sample = sample_of(nn.Linear(2, 2), torch.randn(3, 2), lambda z: z.square().mean())
    identity = Identity()
    assert identity.taps == () and not identity.due({}, 1)
    state: dict[str, object] = {}
    assert identity.update(state, sample, 1) == (state, None)
    assert identity.inverse(state, ParameterVector(sample.parameters.params), 2.0, [0.1, 0.1]) is None
    assert identity.describe(state) == "none"
    assert Identity() == identity and hash(Identity()) == hash(identity)
