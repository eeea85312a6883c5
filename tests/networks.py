"""Small networks of many kinds, each with its loss, its expected cut, and an oracle for JᵀHJ.

The oracle knows nothing of recordings or graphs: it puts a flat vector of parameters into the model by
`functional_call`, and takes first derivatives of z and second derivatives of ell(z, theta) by
`torch.autograd.functional`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from hessfree.recording import CallTree, Owners, Recording, mark_outputs, record
from hessfree.vectors import ParameterVector

DOUBLE = torch.float64
Z = tuple[Tensor, ...]


@dataclasses.dataclass
class Problem:
    """A network and a loss, as a user's closure computes them and as the oracle sees them."""

    model: nn.Module  # owns every parameter
    forward: Callable[[], Tensor]  # the loss, in a user's words
    outputs: Callable[[], Z]  # z, where the cut should be
    ell: Callable[[Z], Tensor]  # the loss as a function of z (and of the parameters that it uses directly)
    cut: str  # what find_cut should say
    inputs: Any = None  # for the operators' from_loss, where one call of the model gives z
    loss_fn: Callable[[Any, Any], Tensor] | None = None
    targets: Any = None
    direct: bool = False
    functional: bool = True  # whether torch.func serves it; else the graph takes over with a warning

    @property
    def parameters(self) -> ParameterVector:
        return ParameterVector([p for p in self.model.parameters() if p.requires_grad])

    def closure(self) -> Tensor:
        self.model.zero_grad()
        loss = self.forward()
        loss.backward()
        return loss


def simple(
    model: nn.Module,
    inputs: Any,
    loss_fn: Callable[[Any, Any], Tensor],
    targets: Any = None,
    *,
    cut: str | None = None,
    functional: bool = True,
) -> Problem:
    """A model whose one output tensor is z."""
    model = model.to(DOUBLE)
    args = inputs if isinstance(inputs, tuple) else (inputs,)
    return Problem(
        model,
        forward=lambda: loss_fn(model(*args), targets),
        outputs=lambda: (model(*args),),
        ell=lambda z: loss_fn(z[0], targets),
        cut=cut or f"outputs of {type(model).__name__}",
        inputs=inputs,
        loss_fn=loss_fn,
        targets=targets,
        functional=functional,
    )


def randn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def classes(*shape: int, high: int, seed: int = 2) -> Tensor:
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(seed))


def mlp(*widths: int, activation: type[nn.Module] = nn.Tanh) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in zip(widths[:-1], widths[1:], strict=True):
        layers += [nn.Linear(a, b), activation()]
    return nn.Sequential(*layers[:-1]).to(DOUBLE)


def hand_written(z: Tensor, y: Tensor) -> Tensor:
    """Neither convex nor separable: its blocks are dense and indefinite."""
    r = z - y
    return (1 + r.square().sum(-1) + r.prod(-1)).square().log1p().mean()


def softplus_pairs(z: Tensor, y: Tensor) -> Tensor:
    """Couples the samples of a batch: a ranking loss."""
    return F.softplus(z[:, None] - z[None] - y[:, None] + y[None]).mean()


# --- modules --------------------------------------------------------------------------------------------------------


class ConvNet(nn.Module):
    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3, padding=1)
        self.norm = nn.BatchNorm2d(2)
        self.head = nn.Linear(2, classes)

    def forward(self, x: Tensor) -> Tensor:
        h = F.selu(self.norm(self.conv(x)))
        return self.head(F.adaptive_avg_pool2d(h, 1).flatten(1))


class Segmenter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.GroupNorm(1, 2), nn.Tanh(), nn.Conv2d(2, 3, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.rnn = kind(2, 3, batch_first=True)
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0])


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x + self.attention(x, x, x, need_weights=False)[0]))


class FusedAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(4, 12)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, 2)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.head(mixed.transpose(1, 2).flatten(2))


class TiedLanguageModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.mix = nn.Linear(3, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        h = torch.tanh(self.mix(self.embed(tokens)))
        return self.head(h + h.cumsum(1))


class Variational(nn.Module):
    """Returns nested outputs that depend on each other, one entry that the loss leaves out, and words."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(3, 4)
        self.decoder = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 3))

    def forward(self, x: Tensor) -> dict[str, Any]:
        mu, logvar = self.encoder(x).chunk(2, 1)
        z = mu + (0.5 * logvar).exp() * torch.randn_like(mu)
        return {"recon": self.decoder(z), "latent": (mu, [logvar]), "unused": z.square(), "name": "vae", "none": None}


class Heads(NamedTuple):
    mean: Tensor
    scale: Tensor


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(3, 4)
        self.mean = nn.Linear(4, 2)
        self.scale = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Heads:
        h = torch.tanh(self.body(x))
        return Heads(self.mean(h), self.scale(h))


class WithLoss(nn.Module):
    """Returns (logits, loss), as many language models do."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(3, 4, 3)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.net(x)
        return logits, F.cross_entropy(logits, y)


class Wrapper(nn.Module):
    """Hands everything on, as DistributedDataParallel and OptimizedModule do."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


class Cube(torch.autograd.Function):
    """x³ / 3 with a backward that autograd can differentiate again, and no jvp."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3 / 3

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return g * x**2


class Custom(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(Cube.apply(self.first(x)))


class Checkpointed(nn.Module):
    def __init__(self, use_reentrant: bool = False) -> None:
        super().__init__()
        self.first, self.body, self.head = nn.Linear(3, 4), mlp(4, 4, 4), nn.Linear(4, 2)
        self.dropout = nn.Dropout(0.3)
        self.use_reentrant = use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        h = checkpoint(lambda t: self.dropout(self.body(t)), self.first(x), use_reentrant=self.use_reentrant)
        return self.head(h)


class InPlace(nn.Module):
    """Writes into its activations."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = F.celu_(self.first(x))
        h = self.second(h)
        h[:, 0] = 0
        return self.head(torch.tanh(h))


class Partial(nn.Module):
    """A frozen layer, a layer that nothing calls, and a parameter that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen, self.used, self.unused = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(2, 2)
        self.bare = nn.Parameter(torch.ones(2))
        self.frozen.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(torch.tanh(self.frozen(x)))


class Scaled(nn.Module):
    """Holds a network and a bare parameter that the closure uses itself."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(3, 3, 2)
        self.log_scale = nn.Parameter(torch.tensor([0.3, -0.2]))


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = mlp(3, 4, 2), mlp(2, 4, 3)


# --- problems -------------------------------------------------------------------------------------------------------


def mean_squared_error() -> Problem:
    return simple(mlp(3, 4, 2), randn(5, 3), F.mse_loss, randn(5, 2, seed=3))


def weighted_cross_entropy() -> Problem:
    weight = torch.tensor([0.5, 1.0, 3.0], dtype=DOUBLE)
    return simple(
        mlp(3, 4, 3), randn(5, 3), lambda z, y: F.cross_entropy(z, y, weight, label_smoothing=0.1), classes(5, high=3)
    )


def bce_with_logits() -> Problem:
    weight = torch.tensor([0.5, 2.0], dtype=DOUBLE)
    return simple(
        mlp(3, 4, 2),
        randn(5, 3),
        lambda z, y: F.binary_cross_entropy_with_logits(z, y, pos_weight=weight),
        classes(5, 2, high=2).to(DOUBLE),
    )


def huber() -> Problem:
    return simple(
        mlp(3, 4, 2), randn(6, 3), lambda z, y: F.huber_loss(z, y, reduction="sum", delta=0.8), randn(6, 2, seed=3)
    )


def indefinite() -> Problem:
    return simple(mlp(3, 4, 2), randn(5, 3), hand_written, randn(5, 2, seed=3))


def ranking() -> Problem:
    return simple(
        nn.Sequential(*mlp(3, 4, 1), nn.Flatten(0)), randn(4, 3), softplus_pairs, randn(4, seed=3)
    )


def conv_batchnorm() -> Problem:
    return simple(ConvNet(), randn(4, 1, 4, 4), F.cross_entropy, classes(4, high=3))


def segmentation() -> Problem:
    return simple(Segmenter(), randn(2, 1, 2, 3), F.cross_entropy, classes(2, 2, 3, high=3))


def gru() -> Problem:
    return simple(Recurrent(nn.GRU), randn(2, 3, 2), F.mse_loss, randn(2, 3, 2, seed=3), functional=False)


def lstm() -> Problem:
    return simple(Recurrent(nn.LSTM), randn(2, 3, 2), F.mse_loss, randn(2, 3, 2, seed=3), functional=False)


def multihead_attention() -> Problem:
    return simple(Attention(), randn(2, 3, 4), F.smooth_l1_loss, randn(2, 3, 2, seed=3))


def fused_attention() -> Problem:
    return simple(
        FusedAttention(), randn(2, 3, 4), lambda z, y: F.cross_entropy(z.transpose(1, 2), y), classes(2, 3, high=3)
    )


def tied_tokens() -> Problem:
    targets = classes(2, 4, high=5, seed=4)
    targets[0, 1] = targets[1, 3] = -100
    return simple(
        TiedLanguageModel(),
        classes(2, 4, high=5),
        lambda z, y: F.cross_entropy(z.flatten(0, 1), y.flatten(), ignore_index=-100),
        targets,
    )


def dropout() -> Problem:
    model = nn.Sequential(nn.Linear(3, 6), nn.Dropout(0.4), nn.Tanh(), nn.Linear(6, 2), nn.Dropout(0.2))
    return simple(model, randn(5, 3), F.mse_loss, randn(5, 2, seed=3))


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


def weight_norm() -> Problem:
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 2))
    return simple(model, randn(5, 3), F.mse_loss, randn(5, 2, seed=3), functional=False)


def custom_function() -> Problem:
    return simple(Custom(), randn(5, 3), F.mse_loss, randn(5, 2, seed=3), functional=False)


def checkpointed() -> Problem:
    return simple(Checkpointed(), randn(5, 3), F.mse_loss, randn(5, 2, seed=3), functional=False)


class CheckpointedAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.norm, self.head = FusedAttention(), nn.BatchNorm1d(3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = checkpoint(lambda t: self.norm(self.attention(t).flatten(0, 1)), x, use_reentrant=False)
        return self.head(h)


def checkpointed_attention() -> Problem:
    return simple(
        CheckpointedAttention(), randn(2, 3, 4), F.mse_loss, randn(6, 2, seed=3), functional=False
    )


def in_place() -> Problem:
    return simple(InPlace(), randn(5, 3), F.mse_loss, randn(5, 2, seed=3), functional=False)


def shared_module() -> Problem:
    inner = mlp(3, 4, 3)
    return simple(nn.Sequential(inner, nn.Tanh(), inner), randn(4, 3), F.mse_loss, randn(4, 3, seed=3))


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


def partly_frozen() -> Problem:
    return simple(Partial(), randn(5, 3), F.mse_loss, randn(5, 2, seed=3))


PROBLEMS: dict[str, Callable[[], Problem]] = {
    f.__name__: f
    for f in (
        mean_squared_error,
        weighted_cross_entropy,
        bce_with_logits,
        huber,
        indefinite,
        ranking,
        conv_batchnorm,
        segmentation,
        gru,
        lstm,
        multihead_attention,
        fused_attention,
        tied_tokens,
        dropout,
        named_outputs,
        nested_outputs,
        encoder_decoder,
        regularised_code,
        called_twice,
        logits_and_loss,
        wrapped,
        weight_penalty,
        bare_parameter,
        differential_equation,
        weight_norm,
        custom_function,
        checkpointed,
        checkpointed_attention,
        in_place,
        shared_module,
        in_place_after,
        partly_frozen,
    )
}


def make(name: str) -> Problem:
    """Build a problem anew, from fixed seeds; the global generator is left at seed 0."""
    torch.manual_seed(7)
    problem = PROBLEMS[name]()
    torch.manual_seed(0)
    return problem


# --- the oracle -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Truth:
    """What the oracle knows: dense matrices."""

    jacobian: Tensor  # [Z, P]
    output_hessian: Tensor  # [Z, Z]
    gauss_newton: Tensor  # [P, P]
    outputs: Tensor  # [Z]
    gradient: Tensor  # [P]


class _Bound(nn.Module):
    def __init__(self, model: nn.Module, function: Callable[..., Any]) -> None:
        super().__init__()
        self.model, self.function = model, function

    def forward(self, *args: Any) -> Any:
        return self.function(*args)


def at(problem: Problem, theta: Tensor, function: Callable[..., Any], *args: Any) -> Any:
    """Call `function` with the flat vector `theta` in place of the model's parameters, from seed 0."""
    params = [p for p in problem.model.parameters() if p.requires_grad]
    pieces = {id(p): t.view_as(p) for p, t in zip(params, theta.split([p.numel() for p in params]), strict=True)}
    # every module once, under every parameter that it holds: functional_call spoils modules that it meets twice
    state = {
        f"model.{prefix}.{name}".replace("..", "."): pieces[id(p)]
        for prefix, part in problem.model.named_modules()
        for name, p in part._parameters.items()
        if p is not None and id(p) in pieces
    }
    torch.manual_seed(0)
    return functional_call(_Bound(problem.model, function), state, args, tie_weights=False)


def flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])


def truth(problem: Problem) -> Truth:
    """Differentiate `problem` densely at its present parameters; the global generator is left at seed 0."""
    theta = flat([p.detach() for p in problem.model.parameters() if p.requires_grad])
    with torch.random.fork_rng(devices=[]):
        values = [t.detach() for t in at(problem, theta, problem.outputs)]
        shapes, sizes = [t.shape for t in values], [t.numel() for t in values]

        def joint(zt: Tensor) -> Tensor:
            z, t = zt.split([sum(sizes), theta.numel()])
            pieces = tuple(p.view(s) for p, s in zip(z.split(sizes), shapes, strict=True))
            return at(problem, t, problem.ell, pieces)

        jacobian = torch.autograd.functional.jacobian(lambda t: flat(at(problem, t, problem.outputs)), theta)
        hessian = torch.autograd.functional.hessian(joint, torch.cat([flat(values), theta]))
        gradient = torch.autograd.functional.jacobian(lambda t: at(problem, t, problem.forward), theta)
    full = torch.cat([jacobian, torch.eye(theta.numel(), dtype=DOUBLE)])
    count = sum(sizes)
    torch.manual_seed(0)
    return Truth(jacobian, hessian[:count, :count], full.T @ hessian @ full, flat(values), gradient)


# --- measuring ------------------------------------------------------------------------------------------------------


def error(found: Tensor, true: Tensor) -> float:
    """Relative error in the Frobenius norm; absolute where the truth is zero. NaN stays NaN."""
    assert found.shape == true.shape
    scale = float(true.norm())
    return float((found - true).norm()) / (scale if scale > 0 else 1.0)


def recorded(problem: Problem, closure: Callable[[], Any] | None = None, keep_inputs: bool = True) -> Recording:
    """Record the problem's closure as the optimizer does."""
    parameters = problem.parameters
    tree = CallTree(Owners(parameters), parameters.device, lambda _: keep_inputs, lambda _: True)
    return record(closure or problem.closure, parameters, tree)
