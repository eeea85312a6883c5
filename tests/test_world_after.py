"""The world after a step: random streams and buffers stand where one ordinary call leaves them."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hessfree import Armijo, FullStep, HessianFree, LevenbergMarquardt
from tests.test_optimizer import closure_for


class Streams:
    """Draws from every source of random numbers, inside and beside the closure."""

    def __init__(self) -> None:
        torch.manual_seed(3)
        random.seed(3)
        np.random.seed(3)
        self.generator = torch.Generator().manual_seed(3)
        self.model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Tanh(), nn.Linear(8, 2))
        self.drawn: list[float] = []

    def loss(self) -> Tensor:
        noise = torch.randn(20, 3) + torch.randn(20, 3, generator=self.generator)
        shift = random.random() + float(np.random.rand())
        out = self.model(noise + shift)
        return F.mse_loss(out, torch.rand(20, 2))

    def note(self) -> None:
        generator_draw = torch.rand((), generator=self.generator)
        self.drawn += [float(torch.rand(())), random.random(), float(np.random.rand()), float(generator_draw)]


@pytest.mark.parametrize("line_search", [FullStep(), Armijo()], ids=["full", "armijo"])
def test_the_random_streams_stand_where_sgd_leaves_them(line_search) -> None:
    drawn = []
    for optimizer_class in (torch.optim.SGD, HessianFree):
        streams = Streams()
        if optimizer_class is HessianFree:
            rule = LevenbergMarquardt(every=1)
            optimizer: torch.optim.Optimizer = HessianFree(
                streams.model.parameters(), damping_rule=rule, line_search=line_search
            )
        else:
            optimizer = torch.optim.SGD(streams.model.parameters(), lr=0.01)
        for _ in range(4):
            optimizer.step(closure_for(optimizer, streams.loss))
            streams.note()
        drawn.append(streams.drawn)
    assert drawn[0] == drawn[1]


def test_buffers_stand_where_one_ordinary_call_leaves_them() -> None:
    streams = Streams()
    twin = copy.deepcopy(streams.model)
    optimizer = HessianFree(streams.model.parameters(), damping_rule=LevenbergMarquardt(every=1), line_search=Armijo())
    state = torch.get_rng_state(), random.getstate(), np.random.get_state(), streams.generator.get_state()
    optimizer.step(closure_for(optimizer, streams.loss))
    assert optimizer.last_step.evaluations >= 2
    torch.set_rng_state(state[0])
    random.setstate(state[1])
    np.random.set_state(state[2])
    streams.generator.set_state(state[3])
    trained, streams.model = streams.model, twin
    streams.loss()
    for (name, a), b in zip(trained.named_buffers(), twin.buffers(), strict=True):
        assert torch.equal(a, b), name
