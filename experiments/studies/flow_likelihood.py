"""What density a flow gives: log p(x) by the augmented differential equation, and how much it weighs in all.

A velocity network v(x, t) carries a standard normal at t = 0 to the data at t = 1. With the divergence
div v = tr ∂v/∂x, the density of the carried points is (see `experiments.likelihood`)

    log p(x) = log N(x(0); 0, I) - ∫₀¹ div v(x(t), t) dt,    x(1) = x,

solved backwards for x and the integral together. In D dimensions the trace costs D reverse passes for every evaluation
of the field; Hutchinson's εᵀJε, ε of random signs and the same along the trajectory, costs one, and is unbiased.

The first part holds both against a flow in closed form: the field that carries N(0, I) to N(m, S) with diagonal S is
v(x, t) = m + (tS - (1-t)I)((1-t)²I + t²S)⁻¹(x - tm); its Jacobian is diagonal, so that Hutchinson too is exact, and the
truth is log N(x; m, S). The other parts train a ToyMLP on a two-dimensional set with HessianFree and integrate its
density over a grid: 1, whatever the network has learned, since a flow moves mass and makes none. Mean log-likelihoods
are over points that training has not seen, beside that of the true density where it is known.
"""

import math
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments import data
from experiments.flow_matching import BatchStream, loss
from experiments.likelihood import log_likelihood, random_signs
from experiments.models import ToyMLP
from experiments.sampling import Sampler
from experiments.studies import drawing
from experiments.studies.base import Form, Row, Scope, Study
from experiments.studies.text import error, markdown, milliseconds
from hessfree import HessianFree

_SETS = ("8gaussians", "moons", "checkerboard")
_MARGIN = 3.0  # around the points of a set: the network's density is nowhere exactly zero
_PATHS, _TIMES = 60, 33
_ROUNDING = 5  # digits of the density in results.json


def _gaussian(scope: Scope) -> Iterator[Row]:
    """Hold both divergences against a flow in closed form."""
    for dim in (2, 16) if scope.quick else (2, 64):
        generator = scope.generator()
        mean, variance = scope.randn(generator, dim), scope.randn(generator, dim).square() + 0.2
        x = mean + variance.sqrt() * scope.randn(generator, 256, dim)
        noise = random_signs(x, generator)

        def field(x: Tensor, t: Tensor, m: Tensor = mean, s: Tensor = variance) -> Tensor:
            return m + (t * s - (1 - t)) / ((1 - t) ** 2 + t**2 * s) * (x - t * m)

        def truth(m: Tensor = mean, s: Tensor = variance, x: Tensor = x) -> Tensor:
            normal = torch.distributions.Normal(m.cpu().double(), s.cpu().double().sqrt())
            return normal.log_prob(x.cpu().double()).sum(1)

        forms = [
            Form.of("exact divergence", partial(_density, field, x, None)),
            Form.of("Hutchinson, fixed noise", partial(_density, field, x, noise)),
        ]
        labels = {"measured": "closed form", "D": dim, "B": len(x)}
        yield from scope.compare(labels, forms, truth, unit="exact divergence")


def _density(field: Any, x: Tensor, noise: Tensor | None) -> Tensor:
    return log_likelihood(field, x, noise=noise).log_density


def _equal_steps(scope: Scope) -> Sampler:
    # an adaptive rule follows every kink of the network far from the data, with ten times as many evaluations
    return Sampler(method="rk4", steps=20 if scope.quick else 50)


def train(dataset: data.Dataset, scope: Scope) -> ToyMLP:
    """Fit a velocity network by streaming flow matching, the step length from 1 to 0.

    Args:
        dataset: Two-dimensional.
        scope: Where, and how long.

    Returns:
        The network, without gradients.
    """
    steps, batch = (30, 512) if scope.quick else (200, 4096)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(scope.seed)
        net = ToyMLP(dataset.dim, time_varying=True).to(scope.device)
    optimizer = HessianFree.stochastic(net.parameters())
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    stream = BatchStream(dataset, scope.seed, scope.device)
    for _ in range(steps):
        rows = stream.draw(batch)

        def closure(rows: Any = rows) -> Tensor:
            optimizer.zero_grad()
            value = loss(net, rows)
            value.backward()
            return value

        optimizer.step(closure)
        schedule.step()
    return net.requires_grad_(False)


def _set(name: str, scope: Scope) -> Iterator[Row]:
    """Train on a set, and weigh and look at the density."""
    dataset = data.load(name)
    net = train(dataset, scope)
    generator = torch.Generator().manual_seed(scope.seed + 1)
    points = dataset.holdout(512 if scope.quick else 2048, generator)
    low, high = points.min(0).values - _MARGIN, points.max(0).values + _MARGIN
    count = 40 if scope.quick else 100
    lines = [torch.linspace(float(a), float(b), count) for a, b in zip(low, high, strict=True)]
    cells = torch.cartesian_prod(*lines)
    area = math.prod(float(line[1] - line[0]) for line in lines)
    sampler = _equal_steps(scope)
    density = log_likelihood(net, cells.to(scope.device), sampler=sampler).log_density.exp().cpu()
    held_out = points.to(scope.device)
    exact = log_likelihood(net, held_out, sampler=sampler)
    estimates = log_likelihood(net, held_out, noise=random_signs(held_out, generator), sampler=sampler)
    difference = (estimates.log_density - exact.log_density).cpu()
    true = _true_density(dataset, points)
    row: Row = {
        "measured": "density",
        "name": name,
        "integral": float(density.sum()) * area,
        "nats": float(exact.log_density.mean()),
        "true_nats": None if true is None else float(true.log().mean()),
        "hutchinson_mean": float(difference.mean()),
        "hutchinson_error": float(difference.std()) / math.sqrt(len(difference)),
        "hutchinson_spread": float(difference.std()),
        "evaluations": exact.evaluations,
        "extent": [float(low[0]), float(high[0]), float(low[1]), float(high[1])],
        "density": [[_rounded(one) for one in line] for line in density.view(count, count).tolist()],
        "paths": _paths(net, scope),
    }
    scope.say(f"{name}: integral {row['integral']:.4f}, {row['nats']:.3f} nats, {exact.evaluations} evaluations")
    yield row


def _true_density(dataset: Any, points: Tensor) -> Tensor | None:
    if isinstance(dataset, data.GaussianMixture):
        variance = dataset.variance
        squares = (points.double()[:, None] - dataset.means).square().sum(2)
        return (-squares / (2 * variance)).exp().mean(1) / (2 * math.pi * variance)
    if isinstance(dataset, data.UniformSquares):
        return torch.full((len(points),), 1 / (len(dataset.corners) * dataset.side**2))
    return None


def _rounded(value: float) -> float:
    return float(f"{value:.{_ROUNDING}g}")


def _paths(net: ToyMLP, scope: Scope) -> list[list[list[float]]]:
    """Carry a few points of the normal to the data: their places at equal times, [path][time][axis]."""
    from torchdiffeq import odeint

    x0 = scope.randn(scope.generator(), _PATHS, 2)
    times = torch.linspace(0, 1, _TIMES, device=scope.device)
    with torch.no_grad():
        places = odeint(lambda t, x: net(x, t), x0, times, method="rk4")
    return [[[_rounded(one) for one in place] for place in path] for path in places.transpose(0, 1).tolist()]


def table(rows: Sequence[Row]) -> str:
    """Arrange the measurements.

    Args:
        rows: Of any parts.

    Returns:
        Markdown.
    """
    tables = []
    known = [row for row in rows if row["measured"] == "closed form"]
    if known:
        lines = [[f"{one['D']}", one["form"], error(one), milliseconds(one)] for one in known]
        tables.append(markdown(["N(0, I) to N(m, S), D", "divergence", "error of log p", "ms (quartiles)"], lines))
    sets = [row for row in rows if row["measured"] == "density"]
    if sets:
        lines = []
        for one in sets:
            true = "-" if one["true_nats"] is None else f"{one['true_nats']:.3f}"
            difference = f"{one['hutchinson_mean']:+.4f} ± {one['hutchinson_error']:.4f}"
            noise = f"{difference} ({one['hutchinson_spread']:.2f} a point)"
            figures = [f"{one['integral']:.4f}", f"{one['nats']:.3f}", true, noise, f"{one['evaluations']}"]
            lines.append([one["name"], *figures])
        header = ["set", "∫ p", "mean log p, nats", "of the true density", "Hutchinson - exact, nats", "evaluations"]
        tables.append(markdown(header, lines))
    return "\n\n".join(tables)


def draw(path: Path, rows: Sequence[Row]) -> None:
    """Draw each density, with the trajectories that led there.

    Args:
        path: The PNG.
        rows: Of any parts.
    """
    sets = [row for row in rows if row["measured"] == "density"]
    subtitle = "log p by the augmented ODE, exact divergence. White: a normal (dots) carried to the data."
    figure = drawing.new_figure(
        "The density of a flow, and how it gets there", subtitle, (5.2 * max(1, len(sets)), 5.6)
    )
    grid = figure.subplots(1, max(1, len(sets)), squeeze=False)[0]
    for axis, row in zip(grid, sets, strict=False):
        density = torch.tensor(row["density"]).T.sqrt().numpy()
        axis.imshow(density, origin="lower", extent=row["extent"], cmap="inferno", aspect="equal")
        for one in row["paths"]:
            xs, ys = zip(*one, strict=True)
            axis.plot(xs, ys, color="white", linewidth=0.7, alpha=0.45)
            axis.plot(xs[0], ys[0], "o", color="white", markersize=2.2, alpha=0.8)
        true = "" if row["true_nats"] is None else f" (truth {row['true_nats']:.2f})"
        title = f"{row['name']}: ∫p = {row['integral']:.3f}\n{row['nats']:.2f} nats a point{true}"
        axis.set_title(title, loc="left", fontsize=12, color=drawing.INK)
        axis.set_xlim(*row["extent"][:2])
        axis.set_ylim(*row["extent"][2:])
        axis.set_xticks([])
        axis.set_yticks([])
    figure.savefig(path)


STUDY = Study(
    name="flow-likelihood",
    question="What density does a flow give its points, and does it integrate to one?",
    parts={"gaussian": _gaussian, **{name: partial(_set, name) for name in _SETS}},
    table=table,
    draw=draw,
    extras=("torchdiffeq",),
)
