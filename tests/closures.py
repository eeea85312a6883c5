"""Problems whose closures do more than call one model and one loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hessfree.recording import mark_outputs
from tests.architectures import (
    DOUBLE,
    Heads,
    Pair,
    Scaled,
    TwoHeads,
    Variational,
    WithLoss,
    Wrapper,
    classes,
    mlp,
    randn,
)
from tests.problem import Problem, Z


def named_outputs() -> Problem:
    def loss_fn(out: Heads, y: Tensor) -> Tensor:
        return (out.scale + (y - out.mean).square() * (-2 * out.scale).exp()).mean()

    model, x, y = TwoHeads().to(DOUBLE), randn(5, 3), randn(5, 2, seed=3)
    return Problem(
        model,
        forward=lambda: loss_fn(model(x), y),
        outputs=lambda: tuple(model(x)),
        ell=lambda z: loss_fn(Heads(*z), y),
        cut="outputs of TwoHeads",
        inputs=x,
        loss_fn=loss_fn,
        targets=y,
    )


def nested_outputs() -> Problem:
    def loss_fn(out: dict[str, Any], x: Tensor) -> Tensor:
        mu, (logvar,) = out["latent"]
        kl = 0.5 * (mu.square() + logvar.exp() - logvar - 1).sum(1).mean()
        return (out["recon"] - x).square().sum(1).mean() + 0.7 * kl

    def outputs() -> Z:
        out = model(x)
        return out["recon"], out["latent"][0], out["latent"][1][0]

    model, x = Variational().to(DOUBLE), randn(4, 3)
    return Problem(
        model,
        forward=lambda: loss_fn(model(x), x),
        outputs=outputs,
        ell=lambda z: loss_fn({"recon": z[0], "latent": (z[1], [z[2]])}, x),
        cut="outputs of Variational",
        inputs=x,
        loss_fn=loss_fn,
        targets=x,
    )


def encoder_decoder() -> Problem:
    """The decoder's input depends on the encoder's parameters; only the decoder's output reaches the loss."""
    pair, x = Pair().to(DOUBLE), randn(4, 3)
    return Problem(
        pair,
        forward=lambda: F.mse_loss(pair.decoder(pair.encoder(x)), x),
        outputs=lambda: (pair.decoder(pair.encoder(x)),),
        ell=lambda z: F.mse_loss(z[0], x),
        cut="outputs of Sequential",
        functional=False,
    )


def regularised_code() -> Problem:
    """Both outputs reach the loss, and one of them through the other as well."""

    def outputs() -> Z:
        code = pair.encoder(x)
        return code, pair.decoder(code)

    def ell(z: Z) -> Tensor:
        return F.mse_loss(z[1], x) + 0.1 * (z[0] ** 4).mean()

    pair, x = Pair().to(DOUBLE), randn(4, 3)
    return Problem(
        pair, lambda: ell(outputs()), outputs, ell, cut="outputs of Sequential", functional=False
    )


def called_twice() -> Problem:
    def ell(z: Z) -> Tensor:
        return F.softplus((z[0] - z[1]).square().sum(1) - 1).mean()

    net, a, b = mlp(3, 4, 2), randn(4, 3), randn(4, 3, seed=5)
    return Problem(
        net, lambda: ell((net(a), net(b))), lambda: (net(a), net(b)), ell, cut="outputs of Sequential"
    )


def logits_and_loss() -> Problem:
    model, x, y = WithLoss().to(DOUBLE), randn(5, 3), classes(5, high=3)
    return Problem(
        model,
        forward=lambda: model(x, y)[1],
        outputs=lambda: (model.net(x),),
        ell=lambda z: F.cross_entropy(z[0], y),
        cut="outputs of Sequential",
        inputs=(x, y),
        loss_fn=lambda out, _: out[1],
    )


def wrapped() -> Problem:
    model, x, y = Wrapper(Wrapper(WithLoss())).to(DOUBLE), randn(5, 3), classes(5, high=3)
    return Problem(
        model,
        forward=lambda: model(x, y=y)[1],
        outputs=lambda: (model.module.module.net(x),),
        ell=lambda z: F.cross_entropy(z[0], y),
        cut="outputs of Sequential",
    )


def weight_penalty() -> Problem:
    def ell(z: Z) -> Tensor:
        return F.mse_loss(z[0], y) + 0.1 * sum((p**4).sum() for p in net.parameters())

    net, x, y = mlp(3, 3, 2), randn(4, 3), randn(4, 2, seed=3)
    return Problem(
        net,
        lambda: ell((net(x),)),
        lambda: (net(x),),
        ell,
        cut="outputs of Sequential + exact Hessian of what the loss adds to them",
        direct=True,
        inputs=x,
        loss_fn=lambda z, _: ell((z,)),
    )


def bare_parameter() -> Problem:
    """A learned noise scale: the loss couples it with the outputs."""

    def ell(z: Z) -> Tensor:
        return ((z[0] - y).square() * model.log_scale.exp() - model.log_scale).mean()

    model, x, y = Scaled().to(DOUBLE), randn(4, 3), randn(4, 2, seed=3)
    return Problem(
        model,
        lambda: ell((model.net(x),)),
        lambda: (model.net(x),),
        ell,
        cut="outputs of Sequential + exact Hessian of what the loss adds to them",
        direct=True,
    )


def differential_equation() -> Problem:
    """A residual that holds second derivatives in the input, marked as the output."""

    def residual() -> Tensor:
        x = points.clone().requires_grad_()
        u = net(x)
        (du,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        (ddu,) = torch.autograd.grad(du.sum(), x, create_graph=True)
        return ddu + u**3 - torch.sin(x)

    net, points = mlp(1, 5, 1), randn(6, 1)
    return Problem(
        net,
        lambda: mark_outputs(residual()).square().mean(),
        lambda: (residual(),),
        lambda z: z[0].square().mean(),
        cut="mark_outputs",
        functional=False,
    )


def in_place_after() -> Problem:
    """The closure writes into the output: the cut is at what the model returned."""

    def ell(z: Z) -> Tensor:
        h = z[0].clone()
        h[mask] = 0.5
        return F.mse_loss(h.tanh_(), y)

    def forward() -> Tensor:
        z = net(x)
        z[mask] = 0.5
        return F.mse_loss(z.tanh_(), y)

    net, x, y = mlp(3, 4, 2), randn(4, 3), randn(4, 2, seed=3)
    mask = torch.tensor([[True, False], [False, False], [True, True], [False, True]])
    return Problem(net, forward, lambda: (net(x),), ell, cut="outputs of Sequential")
