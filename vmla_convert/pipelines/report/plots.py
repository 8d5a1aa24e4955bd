"""The report's plots, drawn from rows; matplotlib is imported only when one is drawn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from vmla_convert.errors import MissingExtraError
from vmla_convert.pipelines.report.panels import (
    Line,
    Panel,
    init_looks,
    recovery_panels,
    rollout_panels,
    spectra_panels,
)
from vmla_convert.pipelines.report.points import (
    Point,
    format_cut,
    format_number,
    format_sizes,
    read_dense,
    read_points,
    size_groups,
)
from vmla_convert.results import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, GREY, GRID = "#1a1a1a", "#595959", "#e3e3e3"
WIDTH_INCHES = 8.6
LEAST_LOG_RANGE = 6.0
LABEL_GAP = 0.075  # share of the height of the axes


def draw_plots(rows: Sequence[Row], bound: float) -> dict[str, Figure]:
    """Every plot that the rows allow, by name; a plot without data is left out.

    Args:
        rows: All rows of the report.
        bound: Flow loss allowed above the dense model's, as a share of it.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    points, dense = read_points(rows), read_dense(rows)
    drawn = {
        "quality": draw_quality(points, dense.scalars if dense is not None else None),
        "recovery": _draw_panels(recovery_panels(points, bound)),
        "spectra": _draw_panels(spectra_panels(rows)),
        "rollout": _draw_panels(rollout_panels(rows)),
    }
    return {name: figure for name, figure in drawn.items() if figure is not None}


def draw_quality(points: Sequence[Point], dense_scalars: float | None) -> Figure | None:
    """velocity_error against cache size: a stem per point from step 0 down to its last step."""
    shown = _best_layers([p for p in points if p.scalars and any(map(_drawable, _stem(p)))])
    if not shown:
        return None
    figure = _new_figure(4.6)
    ax = figure.add_subplot()
    _draw_sizes(ax, shown)
    places = _side_by_side(shown)
    looks = init_looks(point.init for point in shown)
    lines = [
        _draw_init(ax, init, *look, [(p, x) for p, x in places if p.init == init])
        for init, look in looks.items()
    ]
    against = f" {format_number(dense_scalars)}" if dense_scalars is not None else ""
    panel = Panel(
        "Quality against bytes\nhollow: at step 0; filled: after recovery; lower left is best",
        f"cache size: scalars per token and layer (change against the dense model's{against})",
        "velocity error (share of the dense velocity)",
        "log",
        lines,
    )
    _finish(ax, panel)
    return figure


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


def _new_figure(height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("the report's plots", "plots") from error
    return Figure((WIDTH_INCHES, height), dpi=144, facecolor="white", layout="constrained")


def _draw_panels(panels: Sequence[Panel]) -> Figure | None:
    """Panels two to a row; a last one without a neighbour takes the whole row."""
    if not panels:
        return None
    lines_of_panels = math.ceil(len(panels) / 2)
    figure = _new_figure(0.3 + 3.4 * lines_of_panels)
    grid = figure.add_gridspec(lines_of_panels, 2)
    for i, panel in enumerate(panels):
        alone = i == len(panels) - 1 and i % 2 == 0
        ax = figure.add_subplot(grid[i // 2, :] if alone else grid[i // 2, i % 2])
        for line in panel.lines:
            ax.plot(line.xs, line.ys, color=line.colour, marker=line.marker, ms=4, lw=1.8)
        _finish(ax, panel)
    return figure


def _draw_init(
    ax: Axes, init: str, colour: str, marker: str, places: list[tuple[Point, float]]
) -> Line:
    """The stems of one init; returns the line through its best point of each size."""
    best: dict[float, tuple[float, float]] = {}
    for point, x in places:
        start, end = _stem(point)
        if _drawable(start):
            ax.plot([x], [start], marker=marker, ms=7, mfc="white", mec=colour, mew=1.6, zorder=3)
        if _drawable(end) and point.last_step > 0:
            ax.plot([x], [end], marker=marker, ms=7, color=colour, zorder=3)
        if _drawable(start) and _drawable(end):
            ax.plot([x, x], [start, end], color=colour, lw=1.2, alpha=0.7)
        reached = end if _drawable(end) else start
        if reached < best.get(point.size, (0.0, math.inf))[1]:
            best[point.size] = (x, reached)
    xs, ys = [x for x, _ in best.values()], [y for _, y in best.values()]
    ax.plot(xs, ys, color=colour, lw=1.2, ls=":", zorder=1)
    return Line(init, colour, marker, xs, ys)


def _stem(point: Point) -> tuple[float, float]:
    """velocity_error at step 0 and at the last step; infinite where there is none."""
    return point.errors.get(0, math.inf), point.final_error


def _best_layers(points: Sequence[Point]) -> list[Point]:
    """Of each init and size the points of its best layer; a sweep over layers has too many."""
    best: dict[tuple[str, float], Point] = {}
    for point in sorted(points, key=lambda point: point.final_error):
        best.setdefault((point.init, point.size), point)
    return [p for p in points if p.layer == best[p.init, p.size].layer]


def _side_by_side(points: Sequence[Point]) -> list[tuple[Point, float]]:
    """Each point with its place on the log axis, beside its neighbours of about the same size."""
    groups = size_groups(points)
    centres = [_centre(group) for group in groups]
    gaps = [math.log(b / a) for a, b in pairwise(centres)]
    crowd = max(len(group) for group in groups)
    step = min(0.025 * (sum(gaps) or 1.0), 0.7 * min(gaps, default=1.0) / crowd)
    return [
        (point, centre * math.exp((i - (len(group) - 1) / 2) * step))
        for group, centre in zip(groups, centres, strict=True)
        for i, point in enumerate(sorted(group, key=_name))
    ]


def _centre(group: Sequence[Point]) -> float:
    return math.sqrt(group[0].size * group[-1].size)


def _name(point: Point) -> tuple[str, str]:
    return point.init, point.split


def _draw_sizes(ax: Axes, points: Sequence[Point]) -> None:
    """A log axis with a tick at each size; sizes too close to the last tick get none."""
    from matplotlib.ticker import NullLocator

    groups = {_centre(group): group for group in size_groups(points)}
    sizes = sorted(groups)
    spread = math.log(sizes[-1] / sizes[0]) or 1.0
    ticks: list[float] = []
    for size in sizes:
        if not ticks or math.log(size / ticks[-1]) >= 0.12 * spread:
            ticks.append(size)
    labels = [_size_label(groups[size]) for size in ticks]
    ax.set_xscale("log")
    ax.set_xlim(sizes[0] * math.exp(-0.15 * spread), sizes[-1] * math.exp(0.15 * spread))
    ax.set_xticks(ticks, labels)
    ax.xaxis.set_minor_locator(NullLocator())


def _size_label(group: Sequence[Point]) -> str:
    cut = group[-1].cut
    return format_sizes(group) + (f"\n−{format_cut(cut)}" if cut is not None else "")


def _finish(ax: Axes, panel: Panel) -> None:
    """Axes, titles and direct labels, the same on every plot."""
    title, _, subtitle = panel.title.partition("\n")
    ax.set_title(title, loc="left", color=INK, fontsize=11, pad=18 if subtitle else 6)
    if subtitle:
        ax.annotate(
            subtitle, (0, 1), (0, 5), "axes fraction", "offset points", color=GREY, fontsize=8.5
        )
    ax.set_xlabel(panel.xlabel, color=INK, fontsize=9)
    ax.set_ylabel(panel.ylabel, color=INK, fontsize=9)
    ax.tick_params(labelsize=8.5, colors=GREY, which="both", length=3)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(GREY)
    ax.grid(axis="y", color=GRID, lw=0.8)
    ax.set_axisbelow(True)
    if panel.reference is not None:
        ax.axhline(panel.reference, color=GREY, lw=1, ls="--", zorder=1)
    _scale(ax, panel)
    _label_ends(ax, panel.lines)


def _scale(ax: Axes, panel: Panel) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    if panel.yscale == "symlog":
        ax.set_yscale("symlog", linthresh=1)
        heights = [y for line in panel.lines for y in line.ys]
        ax.set_ylim(2 * min(0.0, *heights), 2.5 * max(1.0, panel.reference or 0.0, *heights))
    else:
        ax.set_yscale(panel.yscale)
    if panel.yscale == "log":
        low, high = ax.get_ylim()
        room = max(1.0, math.sqrt(LEAST_LOG_RANGE / (high / low)))
        ax.set_ylim(low / room, high * room)
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    if panel.yscale != "linear":
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        ax.yaxis.set_minor_locator(NullLocator())
    if ax.get_xscale() == "linear":
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))


def _label_ends(ax: Axes, lines: Sequence[Line]) -> None:
    """Name each line at the right edge, moved apart where names would touch."""
    ax.set_xlim(ax.get_xlim())
    ax.set_ylim(ax.get_ylim())
    to_axes = ax.transData + ax.transAxes.inverted()
    heights = [float(to_axes.transform((line.xs[-1], line.ys[-1]))[1]) for line in lines]
    for line, height in zip(lines, spread_apart(heights, LABEL_GAP, top=1.0), strict=True):
        ax.annotate(
            line.label,
            (line.xs[-1], line.ys[-1]),
            (1.02, height),
            "data",
            "axes fraction",
            color=line.colour,
            fontsize=9,
            fontweight="bold",
            va="center",
            arrowprops={"arrowstyle": "-", "color": line.colour, "lw": 0.6, "alpha": 0.5},
        )


def _drawable(value: float) -> bool:
    """Whether a value has a place on a log axis."""
    return math.isfinite(value) and value > 0
