"""How layers look to K-FAC: rows whose products are the gradient, blocks that are exact where they can be."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hessfree import KFAC, GaussNewton, HessianFree
from hessfree.preconditioners.kronecker import KroneckerBlock, Place, kronecker_inverse
from hessfree.preconditioners.layers import parts_of
from hessfree.vectors import ParameterVector
from tests.preconditioners.oracles import sample_of

DOUBLE = torch.float64


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def batch_norm(train: bool) -> nn.Module:
    norm = nn.BatchNorm2d(6)
    norm.running_mean.uniform_(-1, 1)
    norm.running_var.uniform_(0.5, 2)
    return norm.train(train)


LAYERS = {
    "linear": (nn.Linear(4, 3), randn(5, 4)),
    "linear on tokens": (nn.Linear(4, 3), randn(5, 2, 4)),
    "conv1d": (nn.Conv1d(3, 4, 3, stride=2, padding=1), randn(2, 3, 9)),
    "conv2d": (nn.Conv2d(3, 4, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)), randn(2, 3, 7, 8)),
    "conv2d in groups": (nn.Conv2d(4, 6, 3, groups=2, padding="same"), randn(2, 4, 5, 5)),
    "conv2d depthwise": (nn.Conv2d(4, 4, 3, groups=4, bias=False), randn(2, 4, 5, 5)),
    "conv2d circular": (nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), randn(2, 2, 5, 5)),
    "conv2d of one image": (nn.Conv2d(2, 3, 3), randn(2, 5, 5)),
    "conv3d": (nn.Conv3d(2, 3, 2, stride=2), randn(2, 2, 4, 4, 4)),
    "layer norm": (nn.LayerNorm(6), randn(3, 4, 6)),
    "layer norm of two dimensions": (nn.LayerNorm([4, 6]), randn(3, 4, 6)),
    "group norm": (nn.GroupNorm(2, 6), randn(3, 6, 4, 4)),
    "batch norm": (batch_norm(train=True), randn(3, 6, 4, 4)),
    "batch norm in eval mode": (batch_norm(train=False), randn(3, 6, 4, 4)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_rows_multiply_to_the_gradient(name: str) -> None:
    layer, x = LAYERS[name]
    layer = layer.double()
    for p in layer.parameters():
        p.data.uniform_(-1, 1)
    out = layer(x)
    g = randn(*out.shape, seed=1)
    parts = parts_of(layer)
    assert parts
    seen = set()
    for part in parts:
        rows = part.rows(x)
        (expected,) = torch.autograd.grad(out, part.weight, g, retain_graph=True)
        outer = rows.outer(g)
        product = outer.mT @ rows.inner.expand(-1, outer.shape[1], -1)  # norms have a one for every row
        assert (product.reshape(expected.shape) - expected).norm() <= 1e-12 * expected.norm()
        seen |= {id(part.weight), id(part.bias)}
    assert all(id(p) in seen for p in layer.parameters())


def test_rows_of_an_embedding_are_counts() -> None:
    layer = nn.Embedding(5, 3, padding_idx=1).double()
    x = torch.tensor([[0, 2, 2], [4, 1, 0]])
    (part,) = parts_of(layer)
    rows = part.rows(x)
    assert rows.one_hot
    assert part.transposed
    assert torch.equal(rows.inner[0], torch.tensor([2, 0, 2, 0, 1], dtype=DOUBLE) / 6)
    g = randn(2, 3, 3)
    (expected,) = torch.autograd.grad(layer(x), layer.weight, g)
    product = torch.zeros(5, 3, dtype=DOUBLE).index_add_(0, x.reshape(-1), rows.outer(g)[0])
    product[1] = 0
    assert (product - expected).norm() <= 1e-12 * expected.norm()


def test_layers_that_it_does_not_know_get_a_diagonal() -> None:
    for layer in (nn.ConvTranspose2d(2, 3, 3), nn.PReLU(), nn.Embedding(4, 2, max_norm=1.0), nn.LayerNorm(2000)):
        assert parts_of(layer) == []


class Net(nn.Module):
    """Norms between convolutions, as in a U-Net."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Conv2d(2, 4, 3), norm, nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x)).tanh().mean((2, 3)))


@pytest.mark.parametrize("norm", [nn.GroupNorm(2, 4), nn.BatchNorm2d(4).eval()], ids=["group", "batch"])
@pytest.mark.parametrize("loss", [F.mse_loss, F.cross_entropy], ids=["mse", "cross-entropy"])
def test_blocks_of_norms_are_exact(norm: nn.Module, loss) -> None:
    torch.manual_seed(0)
    model, x = Net(norm).double(), randn(6, 2, 5, 5)
    target = randn(6, 3) if loss is F.mse_loss else torch.arange(6) % 3
    sample = sample_of(model, x, lambda z: loss(z, target))
    state, _ = KFAC(factors="exact").update({}, sample, 1)
    dense = GaussNewton.from_loss(model, loss, x, target).to_dense()
    parameters = sample.parameters
    assert state["diagonal"] == {}
    checked = 0
    for block in state["blocks"]:
        p = parameters.params[block["weight"]]
        if p is norm.weight or p is norm.bias:
            place = parameters.slice_of(p)
            expected = dense[place, place]
            assert (block["outer"] * block["inner"] - expected).norm() <= 1e-10 * expected.norm()
            checked += 1
    assert checked == 2


def test_the_last_layer_under_mean_square_needs_no_sample() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 7)).double(), randn(9, 4)
    sample = sample_of(model, x, lambda z: z.square().mean())
    state, _ = KFAC().update({}, sample, 1)
    block = state["blocks"][1]
    assert block["outer_basis"] is None
    assert (block["outer"] - 2 / 7).abs().max() <= 1e-12


@pytest.mark.parametrize("power", [1.0, 0.5])
def test_a_wide_factor_is_exact_where_its_tail_is_flat(power: float) -> None:
    basis, _ = torch.linalg.qr(randn(12, 12))
    values = torch.cat([torch.full((9,), 0.3, dtype=DOUBLE), torch.tensor([2.0, 5.0, 9.0], dtype=DOUBLE)])
    inner = basis @ torch.diag(values) @ basis.T
    root = randn(4, 4, seed=1)
    outer = root @ root.T
    weight = nn.Parameter(torch.zeros(4, 12, dtype=DOUBLE))
    block = KroneckerBlock.of(Place(0, None), inner, outer, rank=3)
    v = randn(48, seed=2)
    found = kronecker_inverse([block.state()], {}, ParameterVector([weight]), 2.0, [0.1], power)(v)
    dense = 2.0 * torch.kron(outer, inner) + 0.1 * torch.eye(48, dtype=DOUBLE)
    s, q = torch.linalg.eigh(dense)
    expected = q @ ((q.T @ v) * s**-power)
    assert (found - expected).norm() <= 1e-10 * expected.norm()


def test_wide_factors_are_taken_at_doubling_updates() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 6), nn.Tanh(), nn.Linear(6, 2)).double()
    kfac = KFAC(wide=16, rank=8)
    state: dict = {}
    inner = []
    for step in range(1, 6):
        sample = sample_of(model, randn(30, 40, seed=step), lambda z: z.square().mean())
        state, _ = kfac.update(state, sample, step)
        inner.append(state["blocks"][0]["inner"])
    assert inner[2] is inner[1]  # update 3 keeps what update 2 found
    assert inner[4] is inner[3]
    means = [torch.cat([randn(30, 40, seed=i), torch.ones(30, 1, dtype=DOUBLE)], 1) for i in (1, 2, 4)]
    expected = sum(a.T @ a / 30 for a in means) / 3
    assert (inner[4] - expected).norm() <= 1e-12 * expected.norm()


def test_a_net_of_every_kind_trains() -> None:
    torch.manual_seed(0)

    class Everything(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.conv = nn.Embedding(10, 8), nn.Conv1d(8, 8, 3, padding=1, groups=2)
            self.norm, self.layer_norm = nn.GroupNorm(2, 8), nn.LayerNorm(8)
            self.scale, self.head = nn.Parameter(torch.ones(8)), nn.Linear(8, 4)

        def forward(self, tokens: Tensor) -> Tensor:
            x = self.norm(self.conv(self.embed(tokens).mT)).mT.tanh()
            return self.head((self.layer_norm(x) * self.scale).mean(1))

    model = Everything()
    tokens = torch.randint(0, 10, (64, 6))
    target = tokens.sum(1) % 4
    optimizer = HessianFree(model.parameters())

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(tokens), target)
        loss.backward()
        return loss

    first = float(closure().detach())
    for _ in range(30):
        optimizer.step(closure)
    assert optimizer.last_step.loss <= 0.2 * first
    assert "diagonal of 1 other parameter" in optimizer.last_step.preconditioner
