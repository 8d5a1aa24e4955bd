"""Charts drawn in one style; matplotlib is imported only when one is drawn."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vmla_convert.errors import MissingExtraError
from vmla_convert.pipelines.report.panels import (
    GREY,
    INK,
    Chart,
    Grid,
    Guide,
    Line,
    Panel,
    log_width,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.transforms import Transform

RULE = "#e3e3e3"
WIDTH_INCHES = 8.6
LABEL_INCHES = 0.19
FRAME_INCHES = 1.0  # of a panel's height that titles and axis labels take
LEAST_LOG_RANGE = 6.0
LOG_ROOM = 1.25


def draw_chart(chart: Chart) -> Figure:
    """A chart as a figure: panels in rows; a last one alone in two columns takes the whole row.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("the report's plots", "plots") from error
    rows = math.ceil(len(chart.panels) / chart.columns)
    size = WIDTH_INCHES, 0.2 + chart.height * rows
    figure = Figure(size, dpi=144, facecolor="white", layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)  # pyright: ignore
    grid = figure.add_gridspec(rows, chart.columns)
    for i, panel in enumerate(chart.panels):
        row, column = divmod(i, chart.columns)
        alone = chart.columns == 2 and column == 0 and i == len(chart.panels) - 1
        ax = figure.add_subplot(grid[row, :] if alone else grid[row, column])
        small = chart.columns > 2
        if isinstance(panel, Grid):
            _draw_grid(ax, panel)
        else:
            _draw_panel(ax, panel, LABEL_INCHES / (chart.height - FRAME_INCHES))
        _finish(ax, panel, small)
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as a PNG of at most 256 colours, a third of the size it would have."""
    from PIL import Image

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    picture = Image.open(buffer).convert("RGB")
    picture.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


def spread_apart(positions: Sequence[float], gap: float, top: float = math.inf) -> list[float]:
    """Positions moved as little as possible so that neighbours are at least `gap` apart.

    Args:
        positions: In any order.
        gap: Least distance.
        top: No position is moved above it.
    """
    order = sorted(range(len(positions)), key=lambda i: positions[i])
    clusters: list[tuple[float, int]] = []
    for place, index in enumerate(order):
        mean, count = positions[index] - place * gap, 1
        while clusters and clusters[-1][0] > mean:
            other, others = clusters.pop()
            mean = (mean * count + other * others) / (count + others)
            count += others
        clusters.append((mean, count))
    means = [mean for mean, count in clusters for _ in range(count)]
    moved = [0.0] * len(positions)
    for place, index in enumerate(order):
        moved[index] = min(means[place] + place * gap, top - (len(order) - 1 - place) * gap)
    return moved


def _draw_panel(ax: Axes, panel: Panel, label_gap: float) -> None:
    ax.set_xscale(panel.xscale)
    if panel.yscale != "symlog":
        ax.set_yscale(panel.yscale)
    for line in panel.lines:
        _draw_line(ax, line)
    for guide in panel.guides:
        draw = ax.axvline if guide.upright else ax.axhline
        draw(guide.value, color=GREY, lw=1, ls="--", zorder=1)
    ax.grid(axis="y", color=RULE, lw=0.8)
    _scale_heights(ax, panel)
    _scale_widths(ax, panel)
    for guide in panel.guides:
        if guide.named:
            _name_guide(ax, guide)
    _label_ends(ax, [line for line in panel.lines if line.named], label_gap)


def _draw_line(ax: Axes, line: Line) -> None:
    """The line, then its markers one by one, where some are hollow or carry a letter."""
    how: dict[str, Any] = {"color": line.colour, "alpha": line.alpha}
    if line.shift:
        # Axes do not see what is shifted: a panel with shifts sets its own range, by `xticks`.
        how["transform"] = _shifted(ax, line.shift)
    if line.width:
        drawstyle = "steps-post" if line.stepped else "default"
        behind = 1 if line.stepped else 2
        ax.plot(
            line.xs, line.ys, lw=line.width, ls=line.dash, drawstyle=drawstyle, zorder=behind,
            solid_capstyle="round", **how,
        )  # fmt: skip
    if not line.marker:
        return
    for x, y, note in zip(line.xs, line.ys, line.notes, strict=False):
        ax.annotate(
            note, (x, y), (line.marker_size, 5), "data", "offset points", color=GREY,
            fontsize=7.5, va="center",
        )  # fmt: skip
    rings = line.hollow and line.marker_size > 12
    for number, (x, y) in enumerate(zip(line.xs, line.ys, strict=True)):
        hollow = number < line.hollow
        fill = "none" if rings else "white" if hollow else line.colour
        ax.plot(
            [x], [y], marker=line.marker, ms=line.marker_size, mfc=fill, mec=line.colour,
            mew=1.5 if hollow else 0.6, zorder=4 if rings else 3, **how,
        )  # fmt: skip
        if line.glyph:
            ink = line.colour if hollow else "white"
            ax.annotate(
                line.glyph, (x, y), (line.shift, -0.3), "data", "offset points", color=ink,
                fontsize=6, fontweight="bold", ha="center", va="center", zorder=5,
            )  # fmt: skip


def _shifted(ax: Axes, shift: float) -> Transform:
    """Places of data, some points of print to the right."""
    from matplotlib.transforms import ScaledTranslation

    figure = ax.get_figure()
    assert figure is not None
    return ax.transData + ScaledTranslation(shift / 72, 0, figure.dpi_scale_trans)  # pyright: ignore


def _scale_heights(ax: Axes, panel: Panel) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    heights = [y for line in panel.lines for y in line.ys]
    heights += [guide.value for guide in panel.guides if not guide.upright]
    heights += panel.cover
    if panel.yscale == "symlog":
        ax.set_yscale("symlog", linthresh=1)
        # A zero keeps room below, for markers on it.
        ax.set_ylim(min(-0.3, 2 * min(heights)), 2.5 * max(1.0, *heights))
    elif panel.yscale == "log":
        low, high = min(heights), max(heights)
        room = max(LOG_ROOM, math.sqrt(LEAST_LOG_RANGE / (high / low)))
        ax.set_ylim(low / room, high * room)
        subs = (1, 2, 5) if high / low < 100 else (1, 3) if high / low < 1e4 else (1,)
        ax.yaxis.set_major_locator(LogLocator(subs=subs))
    if panel.yscale != "linear":
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        ax.yaxis.set_minor_locator(NullLocator())
    if panel.ylimits is not None:
        ax.set_ylim(*panel.ylimits)


def _scale_widths(ax: Axes, panel: Panel) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    if panel.xticks is not None:
        widths = [*panel.xticks, *(x for line in panel.lines for x in line.xs)]
        low, high = min(widths), max(widths)
        room = (log_width(low, high) - math.log(high / low)) / 2
        ax.set_xlim(low * math.exp(-room), high * math.exp(room))
        ax.set_xticks(list(panel.xticks), list(panel.xticks.values()))
        ax.xaxis.set_minor_locator(NullLocator())
    elif panel.xscale == "log":
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        ax.xaxis.set_minor_locator(NullLocator())
    elif any(guide.upright for guide in panel.guides):
        ax.margins(x=0.08)
    elif all(x == round(x) for line in panel.lines for x in line.xs):
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))


def _name_guide(ax: Axes, guide: Guide) -> None:
    """The guide's name on it, at its start: names of lines are at their ends."""
    behind = {"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 0.5}
    how: dict[str, Any] = {"color": GREY, "fontsize": 7.5, "zorder": 2.5, "bbox": behind}
    if guide.upright:
        to_axes = ax.get_xaxis_transform()
        ax.annotate(guide.label, (guide.value, 0.88), (3, 0), to_axes, "offset points", **how)
    else:
        to_axes = ax.get_yaxis_transform()
        ax.annotate(guide.label, (0, guide.value), (3, 2.5), to_axes, "offset points", **how)


def _label_ends(ax: Axes, lines: Sequence[Line], gap: float) -> None:
    """Name each line at the right edge, moved apart where names would touch."""
    ax.set_xlim(ax.get_xlim())
    ax.set_ylim(ax.get_ylim())
    to_axes = ax.transData + ax.transAxes.inverted()
    ends = [max(zip(line.xs, line.ys, strict=True)) for line in lines]
    heights = [float(to_axes.transform(end)[1]) for end in ends]
    for line, end, height in zip(lines, ends, spread_apart(heights, gap, top=1.0), strict=True):
        ax.annotate(
            line.label,
            end,
            (1.04, height),
            _shifted(ax, line.shift),
            "axes fraction",
            color=line.colour,
            fontsize=9,
            fontweight="bold",
            va="center",
            arrowprops={
                "arrowstyle": "-",
                "color": line.colour,
                "lw": 0.6,
                "alpha": 0.5,
                "relpos": (0, 0.5),  # at the name's left edge, clear of other names
                "shrinkB": 0,
            },
        )


def _draw_grid(ax: Axes, grid: Grid) -> None:
    """A cell per layer and index, bands named above, numbers or a scale for the values."""
    layers = sorted({layer for layer, _ in grid.cells})
    indices = sorted({index for _, index in grid.cells})
    table = [[grid.cells.get((layer, i), math.nan) for i in indices] for layer in layers]
    low, high = grid.limits
    mesh = ax.pcolormesh(
        [*(i - 0.5 for i in indices), indices[-1] + 0.5],
        [*(layer - 0.5 for layer in layers), layers[-1] + 0.5],
        table,
        cmap=grid.colours,
        vmin=low,
        vmax=high,
        edgecolors="face" if grid.scale else "#ececea",
        linewidth=0.4,
    )
    ax.set_ylim(layers[-1] + 0.5, layers[0] - 0.5)
    if grid.scale:
        _draw_scale(ax, grid, mesh)
    else:
        _number_cells(ax, grid)
    _draw_bands(ax, grid, indices)
    _tick_integers(ax)


def _draw_scale(ax: Axes, grid: Grid, mesh: object) -> None:
    figure = ax.get_figure()
    assert figure is not None
    low, high = grid.limits
    bar = figure.colorbar(mesh, ax=ax, pad=0.015, aspect=25)  # pyright: ignore
    bar.set_label(grid.scale, color=INK, fontsize=9)
    bar.set_ticks([low, (low + high) / 2, high])
    around = math.isclose(high, math.pi)
    bar.set_ticklabels(["−π", "0", "π"] if around else [f"{v:g}" for v in bar.get_ticks()])
    bar.ax.tick_params(labelsize=8.5, colors=GREY, length=3)
    bar.outline.set_visible(False)  # pyright: ignore


def _number_cells(ax: Axes, grid: Grid) -> None:
    for (layer, index), value in grid.cells.items():
        if value > 1:
            ink = "white" if value > 0.55 * grid.limits[1] else INK
            ax.text(index, layer, f"{value:g}", color=ink, fontsize=7, ha="center", va="center")


def _draw_bands(ax: Axes, grid: Grid, indices: Sequence[int]) -> None:
    """Which part of the axis is time, height and width, above the cells."""
    for name, group in groupby(indices, key=lambda index: grid.bands.get(index, "")):
        members = list(group)
        start, end = members[0] - 0.5, members[-1] + 0.5
        if start > indices[0]:
            ax.axvline(start, color=INK, lw=1.4)
        ax.annotate(
            name, ((start + end) / 2, 1), (0, 3), ax.get_xaxis_transform(), "offset points",
            color=INK, fontsize=8.5, fontweight="bold", ha="center",
        )  # fmt: skip


def _tick_integers(ax: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=16))
    ax.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=10))


def _finish(ax: Axes, panel: Panel | Grid, small: bool) -> None:
    """Axes and titles, the same on every plot."""
    bands = 13 if isinstance(panel, Grid) and any(panel.bands.values()) else 0
    lines = panel.subtitle.count("\n") + 1 if panel.subtitle else 0
    pad = 6 + bands + 12 * lines
    ax.set_title(panel.title, loc="left", color=INK, fontsize=9.5 if small else 11, pad=pad)
    if panel.subtitle:
        ax.annotate(
            panel.subtitle, (0, 1), (0, 4 + bands), "axes fraction", "offset points", color=GREY,
            fontsize=7.5 if small else 8.5, va="bottom",
        )  # fmt: skip
    size = 8 if small else 9
    ax.set_xlabel(panel.xlabel, color=INK, fontsize=size)
    ax.set_ylabel(panel.ylabel, color=INK, fontsize=size)
    ax.tick_params(labelsize=size - 0.5, colors=GREY, which="both", length=3)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(GREY)
    ax.set_axisbelow(True)
