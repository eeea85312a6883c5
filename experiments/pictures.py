"""What a velocity field makes: its samples beside the data, and the field itself, for figures and for TensorBoard."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from experiments.flow_matching import Field
from experiments.plots import INK, colour_of
from experiments.problems.flow import Flow
from experiments.sampling import Sampler

_TIME = 0.5  # at which fields are shown
_SHOWN = 4000  # points of a scatter plot
_GRID = 17  # arrows a side
_TILES = 6  # images a side
_SEED = 777  # of the noise from which all fields start, and of the data shown
_MOVING = Sampler(steps=20)  # for pictures during training, which take a share of the user's time


@dataclass(frozen=True)
class View:
    """The data of a problem as they are shown, and the noise from which samples start.

    Attributes:
        problem: What is solved.
        points: Data, `[n, D]`, on the CPU.
        noise: Where samples start, `[n, D]`, on the device.
    """

    problem: Flow
    points: Tensor
    noise: Tensor

    @classmethod
    def of(cls, problem: Flow) -> "View":
        """Draw data and noise.

        Args:
            problem: What is solved.

        Returns:
            The same at every call.
        """
        generator = torch.Generator().manual_seed(_SEED)
        n = _SHOWN if problem.dim == 2 else _TILES**2
        points = problem.dataset.holdout(n, generator)
        return cls(problem, points, torch.randn(n, problem.dim, generator=generator).to(problem.device))

    @property
    def flat(self) -> bool:
        """Whether points have two components; otherwise they are square images."""
        return self.problem.dim == 2

    @property
    def reach(self) -> float:
        """Half the side of the square that is shown: nearly all data with some room."""
        return 1.15 * torch.quantile(self.points.abs().amax(1), 0.995).item()

    def exact(self) -> Field | None:
        """Give E[u | x_t, t], where it has a closed form."""
        if self.problem.evaluation.expectation is None:
            return None
        sigma = self.problem.evaluation.sigma
        return lambda x, t: self.problem.dataset.conditional_expectation(x, t, sigma)

    def show_points(self, axis: Any, points: Tensor, colour: str) -> None:
        """Draw points as they are: dots in the plane, or tiles.

        Args:
            axis: A matplotlib axis.
            points: `[n, D]`.
            colour: Of dots.
        """
        if not self.flat:
            _tiles(axis, points)
            return
        points = points[points.isfinite().all(1)].cpu()
        axis.scatter(points[:, 0], points[:, 1], s=2.0, color=colour, alpha=0.35, linewidths=0, rasterized=True)
        self._frame(axis)

    @torch.no_grad()
    def show_field(self, axis: Any, field: Field, fastest: float | None = None) -> Any:
        """Draw a field at t = 1/2: arrows in the plane; for images, where it points from noisy images.

        Args:
            axis: A matplotlib axis.
            field: The velocity field v(x, t).
            fastest: The speed at the end of the colour scale; None: that of this field.

        Returns:
            The arrows, for a colour bar; None for images.
        """
        time = torch.tensor(_TIME)
        if not self.flat:
            noisy = self._noisy()
            _tiles(axis, noisy + (1 - _TIME) * field(noisy, time.to(noisy)))
            return None
        ticks = torch.linspace(-self.reach, self.reach, _GRID)
        grid = torch.cartesian_prod(ticks, ticks)
        velocity = field(grid.to(self.problem.device), time.to(self.problem.device)).cpu()
        speed = velocity.norm(dim=1)
        # Lengths by the square root: slow arrows keep a direction that can be seen. Colours tell the speed.
        arrows = velocity / speed.clamp(min=1e-12).sqrt()[:, None]
        longest = arrows.norm(dim=1).nan_to_num(0, 0, 0).max().item() or 1.0
        drawn = axis.quiver(
            *(grid[:, 0], grid[:, 1], arrows[:, 0], arrows[:, 1], speed),
            cmap="viridis",
            angles="xy",
            scale_units="xy",
            scale=longest / (2.2 * self.reach / _GRID),
            width=0.006,
            pivot="mid",
        )
        drawn.set_clim(0, fastest if fastest is not None else speed.nan_to_num(0, 0, 0).max().item())
        self._frame(axis)
        return drawn

    def fastest(self, fields: Sequence[Field]) -> float:
        """Give the highest finite speed of some fields on the grid that is shown.

        Args:
            fields: Velocity fields v(x, t).

        Returns:
            The speed at t = 1/2.
        """
        ticks = torch.linspace(-self.reach, self.reach, _GRID, device=self.problem.device)
        grid = torch.cartesian_prod(ticks, ticks)
        with torch.no_grad():
            speeds = [field(grid, torch.tensor(_TIME).to(grid)).norm(dim=1) for field in fields]
        return torch.cat(speeds).nan_to_num(0, 0, 0).max().item()

    def _noisy(self) -> Tensor:
        return torch.lerp(self.noise, self.points.to(self.noise), _TIME)

    def show_noisy(self, axis: Any) -> None:
        """Draw the noisy images at which fields are shown.

        Args:
            axis: A matplotlib axis.
        """
        _tiles(axis, self._noisy())

    def _frame(self, axis: Any) -> None:
        axis.set_xlim(-self.reach, self.reach)
        axis.set_ylim(-self.reach, self.reach)
        axis.set_aspect("equal")
        axis.locator_params(nbins=5, integer=True)
        axis.tick_params(color="#999999", labelcolor=INK, labelsize=8)
        for spine in axis.spines.values():
            spine.set_color("#CCCCCC")


def _tiles(axis: Any, images: Tensor) -> None:
    """A square of the first images, white where they are brightest, with lines between them that are left blank."""
    side = math.isqrt(images.shape[1])
    gap = max(1, side // 14)
    shown = images[: _TILES**2].detach().cpu().view(_TILES, _TILES, side, side)
    framed = nn.functional.pad(shown, (0, gap, 0, gap), value=math.nan).permute(0, 2, 1, 3)
    whole = framed.reshape(_TILES * (side + gap), -1)[:-gap, :-gap]
    axis.imshow(whole.numpy(), cmap="gray", vmin=-1, vmax=1, interpolation="nearest")
    axis.set_axis_off()


def write_samples(
    path: Path, view: View, fields: Sequence[tuple[str, Field]], sampler: Sampler, scores: Sequence[str]
) -> Path:
    """Draw data and samples of each field in one row, and the fields below.

    Args:
        path: The file to write; its ending gives the format.
        view: Data and noise.
        fields: A name and a velocity field for each column.
        sampler: Carries the noise.
        scores: A line below the name of each column.

    Returns:
        The same path.
    """
    from matplotlib.figure import Figure

    columns = len(fields) + 1
    figure = Figure(figsize=(2.75 * columns + 0.6, 6.1), dpi=150, layout="constrained")
    axes = figure.subplots(2, columns, squeeze=False)
    exact = view.exact() if view.flat else None
    fastest = view.fastest([exact]) if exact is not None else None
    view.show_points(axes[0, 0], view.points, INK)
    _title(axes[0, 0], "data", f"{view.problem.name}, {len(view.points)} points", INK)
    arrows = None
    if not view.flat:
        view.show_noisy(axes[1, 0])
        _title(axes[1, 0], "noisy images", "t = 0.5", INK)
    elif exact is not None:
        arrows = view.show_field(axes[1, 0], exact, fastest)
        _title(axes[1, 0], "exact field", "E[u | x, t] at t = 0.5", INK)
    else:
        axes[1, 0].set_axis_off()
        axes[1, 0].text(0.5, 0.5, "no closed form\nof the exact field", ha="center", va="center", color="#777777")
    for index, (name, field) in enumerate(fields):
        column, colour = index + 1, colour_of(name, index)
        view.show_points(axes[0, column], sampler.carry(field, view.noise), colour)
        _title(axes[0, column], name, scores[index], colour)
        shown = view.show_field(axes[1, column], field, fastest)
        arrows = shown if arrows is None else arrows
        what = "field v(x, t) at t = 0.5" if view.flat else "where the field points"
        _title(axes[1, column], "", what, colour)
    if arrows is not None:
        bar = figure.colorbar(arrows, ax=axes[1, :].tolist(), shrink=0.75, aspect=22, pad=0.015, extend="max")
        bar.set_label("speed", color=INK)
        bar.outline.set_visible(False)
    figure.savefig(path)
    return path


def _title(axis: Any, name: str, line: str, colour: str) -> None:
    if name:
        axis.set_title(f"{name}\n", fontsize=11, fontweight="bold", color=colour, loc="left")
    axis.annotate(
        line, (0, 1), xycoords="axes fraction", xytext=(0, 6), textcoords="offset points", fontsize=8, color="#555555"
    )


def snapshot(view: View, name: str) -> Callable[[Field], dict[str, Tensor]]:
    """Make what draws one optimizer's pictures during training.

    Args:
        view: Data and noise.
        name: The optimizer, for its colour.

    Returns:
        From a field, images `[height, width, 3]`, uint8, by tag: one page, after those of losses and the optimizer.
    """
    colour = colour_of(name, 0)

    def draw(field: Field) -> dict[str, Tensor]:
        samples = _MOVING.carry(field, view.noise)
        return {
            "samples/points": _render(lambda axis: view.show_points(axis, samples, colour)),
            "samples/field": _render(lambda axis: view.show_field(axis, field)),
        }

    return draw


def _render(draw: Callable[[Any], object]) -> Tensor:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4, 4), dpi=90)
    canvas = FigureCanvasAgg(figure)
    draw(figure.add_axes((0.08, 0.06, 0.9, 0.9)))
    canvas.draw()
    pixels: Any = canvas.buffer_rgba()
    return torch.frombuffer(bytearray(pixels), dtype=torch.uint8).view(*canvas.get_width_height()[::-1], 4)[..., :3]
