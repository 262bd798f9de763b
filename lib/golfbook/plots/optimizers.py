"""Pictures of what optimisers do: momentum in a valley, Newton-Schulz on the directions of a gradient."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import ArrayLike

from golfbook.analysis.optimizers import share_in_band
from golfbook.plots.style import BLACK, BLUE, GREY, LIGHT, ORANGE, RED, SKY, Picture, new, styled

SMALLEST = 1e-4  # of a singular value in a picture; smaller ones lie on the edge
NEAR = 1e-4  # of the distance from the minimum, the same


@styled
def valley(
    path: ArrayLike,
    curvatures: tuple[float, float],
    *,
    arrived: float,
    at: tuple[float, float],
    tried: tuple[ArrayLike, ArrayLike, ArrayLike] | None = None,
) -> Picture:
    """Draw a path down a valley, its two directions apart, and how other settings fare.

    ``path`` (steps + 1, 2) is drawn over the contours of a quadratic with these ``curvatures``, and as the distance
    along each direction. ``arrived`` is the number of steps it took (inf: it did not), ``at`` its rate and momentum.
    ``tried`` has rates (R,), momenta (M,) and the steps (M, R) that each pair takes.
    """
    steps = np.asarray(path, float)
    figure, (left, middle, right) = new(3, width=11.0, height=3.7, width_ratios=(1, 1, 1.15))
    x, y = np.meshgrid(np.linspace(-1.3, 1.3, 80), np.linspace(-1.3, 1.3, 80))
    left.contour(x, y, curvatures[0] * x**2 + curvatures[1] * y**2, levels=12, colors=LIGHT, linewidths=0.9)
    left.plot(*np.clip(steps, -1.3, 1.3).T, color=BLUE, marker="o", markersize=3, linewidth=1.1)
    left.plot(0, 0, "*", color=RED, markersize=11)
    left.set(xlim=(-1.35, 1.35), ylim=(-1.35, 1.35), xlabel="flat direction", ylabel="steep direction")
    left.grid(visible=False)
    took = f"arrives after {arrived:.0f} steps" if np.isfinite(arrived) else "does not arrive"
    left.set_title(f"rate {at[0]:.3f}, momentum {at[1]:.2f}:\n{took}", fontsize=11)
    sizes = np.clip(np.abs(steps), NEAR, 10)
    for column, (name, colour) in enumerate((("flat", ORANGE), ("steep", BLUE))):
        middle.plot(sizes[:, column], color=colour, label=f"{name}, curvature {curvatures[column]:g}")
    middle.axhline(0.01, color=GREY, linestyle="--", linewidth=1.0, label="arrived: 1 %")
    middle.set(yscale="log", ylim=(NEAR, 10), xlabel="step", ylabel="distance from the minimum")
    middle.set_title("Each direction moves alone", fontsize=11)
    middle.legend(fontsize=8.5)
    if tried is None:
        right.set_axis_off()
        words = "all other settings:\ntick the box when you\nhave found your best"
        right.text(0.5, 0.5, words, ha="center", color=GREY)
        return figure
    rates, momenta, found = (np.asarray(values, float) for values in tried)
    mesh = right.pcolormesh(rates, momenta, np.where(np.isfinite(found), found, np.nan), cmap="viridis_r", vmax=150)
    figure.colorbar(mesh, ax=right, label="steps to arrive (white: over 400)")
    row, best = divmod(int(np.argmin(found)), found.shape[1])
    right.plot(*at, "o", mfc="none", mec=BLACK, mew=2, markersize=9, label="yours", clip_on=False)
    words = f"best: {found[row, best]:.0f} steps, momentum {momenta[row]:.2f}"
    right.plot(rates[best], momenta[row], "*", color=RED, markersize=11, label=words)
    slow = f"best without momentum: {found[0].min():.0f} steps"
    right.plot(rates[np.argmin(found[0])], 0, "s", color=RED, markersize=6, label=slow, clip_on=False)
    right.set(xlabel="learning rate", ylabel="momentum", xlim=(0, rates.max()), ylim=(0, momenta.max()))
    right.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.2))
    right.grid(visible=False)
    return figure


@styled
def newton_schulz(
    sizes: ArrayLike, coefficients: Sequence[tuple[float, float, float]], *, step: int, title: str
) -> Picture:
    """Draw what Newton-Schulz has done to each singular direction of a gradient after ``step`` steps.

    ``sizes`` (steps + 1, n) holds the size along each direction after 0, 1, ... steps, in the order of the singular
    values; ``coefficients`` are those of the steps. Left the polynomial of the last step with what it did, right all
    sizes.
    """
    values, floor = _floor(sizes)
    figure, (left, right) = new(2, width=10.0, height=4.3)
    before = values[max(step - 1, 0)]
    _draw_map(left, coefficients[max(step - 1, 0)], floor)
    left.scatter(before, values[step], s=16, color=BLUE, alpha=0.7, zorder=3, label="directions of the gradient")
    left.set_title(f"Polynomial of step {max(step, 1)}" + ("" if step else " (not yet applied)"))
    left.legend(loc="lower right", fontsize=9)
    order = np.arange(1, values.shape[1] + 1)
    for k in range(step):
        colour = GREY if not k else SKY
        right.plot(order, values[k], color=colour, linewidth=1.8 if not k else 0.9, label="gradient" if not k else None)
    right.plot(order, values[step], color=BLUE, label=f"after {step} step{'' if step == 1 else 's'}")
    right.axhline(1, color=RED, linestyle="--", linewidth=1.2, label="exactly orthogonal")
    now = values[step]
    right.set(yscale="log", ylim=(floor * 0.8, 3), xlabel="direction, largest singular value first", ylabel="size")
    right.set_title(f"n = {len(now)}, median {np.median(now):.2g}, {share_in_band(now):.0%} in 0.7 to 1.3")
    right.legend(loc="lower left", fontsize=9)
    figure.suptitle(title, x=0.01, ha="left")
    return figure


@styled
def newton_schulz_moment(
    series: Mapping[str, tuple[ArrayLike, Sequence[tuple[float, float, float]]]], moment: float, *, title: str
) -> Picture:
    """Draw one moment of Newton-Schulz in motion: a frame of the animation, a column a series.

    ``series`` maps a name to sizes (steps + 1, n) and the coefficients of the steps. At a whole ``moment`` k all
    directions lie on the diagonal at their size after k steps; in between they first rise to the polynomial of the
    step, then move across to the diagonal, which makes the result the next step's input.
    """
    figure, all_axes = new(len(series), width=8.4, height=4.4)
    for axes, (name, (sizes, coefficients)) in zip(all_axes, series.items(), strict=True):
        values, floor = _floor(sizes)
        step = min(int(moment), len(coefficients) - 1)
        part = moment - step
        before, after = np.log(values[step]), np.log(values[step + 1])
        x = np.exp(before + (after - before) * max(0.0, 2 * part - 1))
        y = np.exp(before + (after - before) * min(1.0, 2 * part))
        _draw_map(axes, coefficients[step], floor)
        axes.scatter(x, y, s=14, color=BLUE, zorder=3)
        done = step + 1 if part >= 1 else step
        steps = f"{done} of {len(coefficients)} steps"
        axes.set_title(f"{name}: {steps}\n{share_in_band(y):.0%} of n = {len(y)} in 0.7 to 1.3", fontsize=11)
    figure.suptitle(title, x=0.01, ha="left", fontsize=12)
    return figure


def _floor(sizes: ArrayLike) -> tuple[np.ndarray, float]:
    """Return sizes that logarithmic axes can show, and where these begin: a power of ten below the first smallest."""
    values = np.abs(np.asarray(sizes, float))
    low = max(SMALLEST, 10.0 ** np.floor(np.log10(max(float(values[0].min()), SMALLEST))))
    return np.maximum(values, low), low


def _draw_map(axes: Axes, coefficients: tuple[float, float, float], low: float) -> None:
    """Draw the polynomial of a step over its input, both logarithmic from ``low`` on."""
    a, b, c = coefficients
    x = np.geomspace(low, 1.4, 400)
    axes.plot(x, x, color=LIGHT, linewidth=1.2)
    axes.axhline(1, color=RED, linestyle="--", linewidth=1.0)
    axes.plot(x, np.maximum(np.abs(a * x + b * x**3 + c * x**5), low), color=ORANGE, linewidth=1.6)
    axes.set(xscale="log", yscale="log", xlim=(low * 0.8, 1.6), ylim=(low * 0.8, 3))
    axes.minorticks_off()  # most of the time that a frame takes
    axes.set(xlabel="size before the step", ylabel="size after it")
