"""The figures of the report: all candidates on the reference, marginals over each other, and how the fits went."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pyro_vi_lab.posterior import Posterior, element_name
from pyro_vi_lab.report.svg import (
    CARD,
    DASHES,
    INK,
    LINE,
    MARKERS,
    MUTED,
    REFERENCE,
    REFERENCE_FILL,
    color,
    drawing,
    to_svg,
)
from pyro_vi_lab.report.words import number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Array = NDArray[Any]

Size = tuple[float, float]
"""Width and font size of a large figure."""
SIZES: Mapping[str, Size] = {"wide": (760, 11), "narrow": (360, 12)}
"""Large figures come twice, for a desk and for a phone; the page shows one of them."""
INTERVAL = (0.05, 0.25, 0.5, 0.75, 0.95)
"""The thin line holds 90% of the draws, the thick one 50%."""
MAX_FOREST_REACH = 8.0
"""Reference sds beyond which the forest plot is cut off: farther is wrong, whatever the distance."""
PANEL = (0.002, 0.998)
"""Quantiles of the draws between which a marginal is shown."""
CURVE_POINTS = 96
MAX_CURVE_POINTS = 400
MAX_BINS = 2**16
MAX_ABOVE = 1e15
MAX_LABEL = 26


def scalars(posterior: Posterior, wanted: Sequence[str]) -> dict[str, Array]:
    """Draws ``(C·S,)`` of the wanted scalars, by their names."""
    left, found = set(wanted), {}
    for site, value in posterior.flat().items():
        array = value.numpy(force=True)
        for index in np.ndindex(array.shape[1:]):
            name = element_name(site, index)
            if name in left:
                found[name] = array[(slice(None), *index)].astype(float)
    return {name: found[name] for name in wanted if name in found}


def labeled(values: Mapping[str, Tensor]) -> dict[str, float]:
    """Every scalar of every site by its name."""
    return {
        element_name(site, index): float(value[index])
        for site, value in values.items()
        for index in np.ndindex(tuple(value.shape))
    }


def forest(
    reference: Mapping[str, Array],
    candidates: Mapping[str, Mapping[str, Array]],
    labels: Mapping[str, str],
    *,
    order: Sequence[str],
    size: Size,
    name: str,
) -> str:
    """Central intervals of every parameter in reference standard deviations around the reference mean.

    Args:
        reference: Parameter to draws.
        candidates: Candidate to parameter to draws.
        labels: Parameter to what the user calls it.
        order: All candidates; the place in it gives the color.
        size: For a desk or for a phone.
        name: Unique on the page.

    Shape:
        all draws ``(number of draws,)``.
    """
    row_height = 15 + 9 * len(candidates)
    parameters = list(reference)
    height = 58 + row_height * len(parameters)
    width, font_size = size
    ticks = [_shortened(f"{labels[name]}  {name}" if labels.get(name) else name) for name in parameters]
    label_width = max(map(len, ticks)) * font_size * 0.6 + 16
    with drawing(width, height, font_size=font_size) as figure:
        axes = figure.add_axes((label_width / width, 46 / height, 1 - (label_width + 12) / width, 1 - 54 / height))
        reach = 2.0
        for i, parameter in enumerate(parameters):
            mean, sd = reference[parameter].mean(), reference[parameter].std()
            y = -float(i)
            if i % 2:
                axes.axhspan(y - 0.5, y + 0.5, color=LINE, alpha=0.28, linewidth=0)
            low, lower, middle, upper, high = (np.quantile(reference[parameter], INTERVAL) - mean) / sd
            axes.barh(y, high - low, left=low, color=REFERENCE_FILL, height=0.8, linewidth=0)
            axes.barh(y, upper - lower, left=lower, color=REFERENCE, alpha=0.45, height=0.8, linewidth=0)
            axes.plot([middle, middle], [y - 0.4, y + 0.4], color=REFERENCE, linewidth=1.4, solid_capstyle="butt")
            reach = max(reach, abs(low), abs(high))
            for j, (key, draws) in enumerate(candidates.items()):
                values = (np.quantile(draws[parameter], INTERVAL) - mean) / sd
                offset = y + (0.5 - (j + 1) / (len(candidates) + 1)) * 0.78
                _interval(axes, offset, np.clip(values, -MAX_FOREST_REACH, MAX_FOREST_REACH), order.index(key))
                reach = max(reach, float(np.abs(values).max()))
        reach = min(reach, MAX_FOREST_REACH) * 1.06
        axes.set(xlim=(-reach, reach), ylim=(0.6 - len(parameters), 0.6))
        axes.axvline(0, color=MUTED, linewidth=0.8, dashes=(2, 3), zorder=0)
        axes.set_yticks([-float(i) for i in range(len(parameters))], ticks)
        axes.tick_params(axis="y", length=0, pad=8)
        axes.set_xlabel("reference sd from the reference mean")
        label = (
            f"Intervals of {len(parameters)} parameters in reference standard deviations: "
            f"{', '.join(candidates) or 'no candidate'} on the reference"
        )
        return to_svg(figure, name, label, css=name.rpartition("-")[2])


def _interval(axes: Axes, y: float, values: Array, j: int) -> None:
    low, lower, middle, upper, high = values
    axes.plot([low, high], [y, y], color=color(j), linewidth=1.5, solid_capstyle="butt")
    axes.plot([lower, upper], [y, y], color=color(j), linewidth=4, solid_capstyle="butt")
    axes.plot(
        [middle],
        [y],
        MARKERS[j % len(MARKERS)],
        color=CARD,
        markeredgecolor=color(j),
        markersize=5,
        markeredgewidth=1.6,
    )


def marginal(
    parameter: str, reference: Array, candidates: Mapping[str, Array], *, order: Sequence[str], name: str
) -> str:
    """Densities of one parameter over each other; the reference is the filled one."""
    ends = [np.quantile(draws, PANEL) for draws in (reference, *candidates.values())]
    low, high = min(float(low) for low, _ in ends), max(float(high) for _, high in ends)
    grid = np.linspace(low, high, CURVE_POINTS)
    with drawing(240, 130, font_size=11.5) as figure:
        axes = figure.add_axes((0.03, 0.2, 0.94, 0.76))
        curve = density(reference, grid)
        axes.fill_between(grid, curve, color=REFERENCE_FILL, linewidth=0)
        axes.plot(grid, curve, color=REFERENCE, linewidth=1.3)
        for key, draws in candidates.items():
            j = order.index(key)
            if np.ptp(draws) > 0:
                axes.plot(grid, density(draws, grid), color=color(j), linewidth=1.9, linestyle=DASHES[j % len(DASHES)])
            else:
                axes.axvline(draws[0], color=color(j), linewidth=1.9, linestyle=DASHES[j % len(DASHES)])
        axes.set(yticks=[], xlim=(low, high), ylim=(0, None))
        axes.locator_params(axis="x", nbins=4)
        axes.tick_params(axis="x", length=3)
        label = f"Marginal densities of {parameter}: reference mean {number(reference.mean())}, " + ", ".join(
            f"{key} {number(draws.mean())}" for key, draws in candidates.items()
        )
        return to_svg(figure, name, label)


def density(draws: Array, grid: Array) -> Array:
    """Kernel density estimate with Silverman's bandwidth, reflected at the smallest and the largest draw.

    The reflection keeps the estimate high where a bounded support ends. A histogram of fine bins is smoothed, which for
    thousands of draws is a hundred times faster than a sum of kernels and looks the same.

    Shape:
        draws ``(S,)``, not all equal; grid and result ``(G,)``.

    References:
        Silverman 1986, "Density estimation for statistics and data analysis", eq. 3.31.
    """
    from scipy.ndimage import gaussian_filter1d

    low, high = draws.min(), draws.max()
    quartiles = np.subtract(*np.quantile(draws, (0.75, 0.25)))
    bandwidth = 0.9 * min(draws.std(), quartiles / 1.34 or np.inf) * len(draws) ** -0.2
    num_bins = int(np.clip(np.ceil(4 * (high - low) / bandwidth), 64, MAX_BINS))
    counts, edges = np.histogram(draws, num_bins, density=True)
    smooth = gaussian_filter1d(counts, bandwidth / (edges[1] - edges[0]), mode="reflect")
    middles = (edges[1:] + edges[:-1]) / 2
    return np.where((grid >= low) & (grid <= high), np.interp(grid, middles, smooth), 0.0)


def convergence(histories: Mapping[str, Array], lowest: float, *, size: Size, name: str) -> str:
    """Negative ELBO of every candidate against its steps, above the lowest one of the comparison.

    Args:
        histories: Candidate to its negative ELBO at every step; their order gives the colors.
        lowest: Negative ELBO of the best candidate.
        size: For a desk or for a phone.
        name: Unique on the page.

    Shape:
        each history ``(steps,)`` or ``(steps, R)``.
    """
    curves = {key: value.reshape(len(value), -1) for key, value in histories.items()}
    (width, font_size), height = size, 250.0
    with drawing(width, height, font_size=font_size) as figure:
        axes = figure.add_axes((60 / width, 46 / height, 1 - 76 / width, 1 - 62 / height))
        top = 1.0
        for j, curve in enumerate(curves.values()):
            steps = np.unique(np.linspace(0, len(curve) - 1, min(len(curve), MAX_CURVE_POINTS)).astype(int))
            above = np.where(np.isfinite(curve), curve, np.nan)[steps] - lowest
            above = np.clip(above, -1.0, MAX_ABOVE)  # a fit that diverges leaves the picture
            axes.plot(steps, above, color=color(j), linewidth=1.9, linestyle=DASHES[j % len(DASHES)])
            if bool(np.isfinite(above).any()):
                top = max(top, float(np.nanmax(above)))
        axes.set_yscale("symlog", linthresh=1.0, linscale=0.6)
        axes.set_ylim(-0.6, top * 1.6)
        decades = [10.0**k for k in range(0, int(np.log10(top)) + 1)]
        shown = [0.0, *decades[:: max(1, len(decades) // 4)]]
        axes.set_yticks(
            shown, ["0", *(f"{tick:,.0f}" if tick < 1e5 else f"1e{int(np.log10(tick))}" for tick in shown[1:])]
        )
        axes.minorticks_off()
        axes.grid(axis="y", color=LINE, linewidth=0.8)
        axes.tick_params(axis="y", length=0, pad=6)
        axes.set_xlim(left=0)
        axes.locator_params(axis="x", nbins=6, integer=True)
        axes.set_xlabel("step")
        axes.text(0, 1.03, "nats above the lowest negative ELBO", transform=axes.transAxes, color=MUTED)
        axes.axhline(0, color=INK, linewidth=0.8, alpha=0.5)
        label = "Negative ELBO against steps: " + ", ".join(
            f"{key} from {number(curve[0].min())} to {number(curve[-1].min())} in {len(curve) - 1} steps"
            for key, curve in curves.items()
        )
        return to_svg(figure, name, label, css=name.rpartition("-")[2])


def swatch(j: int) -> str:
    """The line and the marker that stand for a candidate in every figure; without ids, since it appears often."""
    from matplotlib.markers import MarkerStyle
    from matplotlib.patches import PathPatch
    from matplotlib.transforms import Affine2D

    marker = MarkerStyle(MARKERS[j % len(MARKERS)])
    outline = marker.get_path().transformed(marker.get_transform() + Affine2D().scale(6).translate(20, 7))
    with drawing(40, 14) as figure:
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        axes.set(xlim=(0, 40), ylim=(0, 14))
        style = {"color": color(j), "linewidth": 2.2, "linestyle": DASHES[j % len(DASHES)], "clip_on": False}
        axes.plot([0, 40], [7, 7], **style)
        axes.add_patch(PathPatch(outline, facecolor=CARD, edgecolor=color(j), linewidth=1.8, clip_on=False, zorder=3))
        svg = to_svg(figure, f"swatch{j}", "", css="swatch")
        return svg.replace('role="img" aria-label=""', 'aria-hidden="true"')


def _shortened(text: str) -> str:
    return text if len(text) <= MAX_LABEL else f"{text[: MAX_LABEL - 10]}…{text[-9:]}"
