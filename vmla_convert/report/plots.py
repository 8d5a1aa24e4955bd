"""Panels of labelled lines, and how matplotlib draws them.

Panels hold everything that is drawn, so that the CSV of a plot is complete. matplotlib is
imported only when a chart is drawn.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vmla_convert.errors import MissingExtraError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, GREY, RULE = "#1a1a1a", "#595959", "#e3e3e3"
MARKERS = ["o", "s", "D", "^", "v", "P", "X"]
WIDTH_INCHES = 8.6
ROW_INCHES, ALONE_INCHES = 3.5, 4.8
LABEL_INCHES = 0.19
FRAME_INCHES = 1.0  # of a panel's height that titles and axis labels take
LOG_ROOM = 1.3
RING = 13.0  # points of a marker around another


@dataclass(frozen=True)
class Line:
    """One line of a panel.

    Attributes:
        label: Name in the CSV, and at the line's end where `named`.
        colour: Colour of line, markers and label.
        xs: Horizontal coordinates, at least one.
        ys: Vertical coordinates, as many as `xs`.
        marker: Marker, a name of matplotlib; empty for none.
        named: Whether the label is drawn.
        width: Width of the line in points; 0 draws markers alone.
        dash: Line style, a name of matplotlib.
        hollow: Whether markers are not filled.
        marker_size: Size in points.
    """

    label: str
    colour: str
    xs: list[float]
    ys: list[float]
    marker: str = ""
    named: bool = True
    width: float = 1.8
    dash: str = "-"
    hollow: bool = False
    marker_size: float = 4.5


@dataclass(frozen=True)
class Panel:
    """One pair of axes.

    Attributes:
        title: What is shown.
        subtitle: How to read the panel.
        xlabel: Horizontal quantity with the unit.
        ylabel: Vertical quantity with the unit.
        lines: At least one line, each with at least one point.
        xscale: Scale of the horizontal axis, a name of matplotlib.
        yscale: Scale of the vertical axis.
        marks: Named vertical reference lines, by horizontal coordinate.
        ylimits: Limits of the vertical axis; None for automatic limits.
    """

    title: str
    subtitle: str
    xlabel: str
    ylabel: str
    lines: list[Line]
    xscale: str = "linear"
    yscale: str = "linear"
    marks: dict[str, float] = field(default_factory=dict)
    ylimits: tuple[float, float] | None = None


Chart = list[Panel]
"""One picture: panels from left to right, then down, at most two in a row."""


def curve_line(label: str, colour: str, curve: Mapping[int, float], **how: Any) -> list[Line]:
    """A line through the finite values of a curve; empty without finite values."""
    finite = sorted((float(x), y) for x, y in curve.items() if math.isfinite(y))
    xs, ys = [x for x, _ in finite], [y for _, y in finite]
    return [Line(label, colour, xs, ys, **how)] if finite else []


def chart_csv(chart: Chart) -> str:
    """All points of a chart as CSV: panel, line, x, y."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["panel", "line", "x", "y"])
    for panel in chart:
        for line in panel.lines:
            pairs = zip(line.xs, line.ys, strict=True)
            writer.writerows([panel.title, line.label, x, y] for x, y in pairs)
        writer.writerows([panel.title, name, x, ""] for name, x in panel.marks.items())
    return text.getvalue()


def draw_chart(chart: Chart) -> Figure:
    """A chart as a figure. A panel that is alone in the last row takes the whole row.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("the report's plots", "plots") from error
    columns = min(2, len(chart))
    rows = math.ceil(len(chart) / columns)
    height = ROW_INCHES if len(chart) > 1 else ALONE_INCHES
    size = WIDTH_INCHES, 0.2 + height * rows
    figure = Figure(size, dpi=144, facecolor="white", layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)  # pyright: ignore
    grid = figure.add_gridspec(rows, columns)
    for i, panel in enumerate(chart):
        row, column = divmod(i, columns)
        alone = column == 0 and i == len(chart) - 1
        ax = figure.add_subplot(grid[row, :] if alone else grid[row, column])
        _draw_panel(ax, panel, LABEL_INCHES / (height - FRAME_INCHES))
        _finish(ax, panel)
    return figure


def spread_apart(positions: Sequence[float], gap: float, top: float = math.inf) -> list[float]:
    """Positions moved as little as possible so that neighbours are at least `gap` apart.

    No position is moved above `top`.
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
    ax.set_yscale(panel.yscale)
    for line in panel.lines:
        ax.plot(
            line.xs, line.ys, color=line.colour, lw=line.width, ls=line.dash if line.width else "",
            marker=line.marker or None, ms=line.marker_size,
            mfc="none" if line.marker_size == RING else "white" if line.hollow else line.colour,
            mew=1.4 if line.hollow else 0.6, solid_capstyle="round",
        )  # fmt: skip
    ax.grid(axis="y", color=RULE, lw=0.8)
    _scale_axes(ax, panel)
    for name, x in panel.marks.items():
        ax.axvline(x, color=GREY, lw=1, ls="--", zorder=1)
        place, to_axes = (x, 1), ax.get_xaxis_transform()  # above the leaders of names
        how: dict[str, Any] = {"ha": "center", "color": GREY, "fontsize": 8.5}
        ax.annotate(name, place, (0, 4), to_axes, "offset points", **how)
    _label_ends(ax, [line for line in panel.lines if line.named], label_gap)


def _scale_axes(ax: Axes, panel: Panel) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    xs = [x for line in panel.lines for x in line.xs] + list(panel.marks.values())
    ys = [y for line in panel.lines for y in line.ys] + list(panel.ylimits or ())
    for values, scale, axis, limit in (
        (xs, panel.xscale, ax.xaxis, ax.set_xlim),
        (ys, panel.yscale, ax.yaxis, ax.set_ylim),
    ):
        if scale == "log":
            low, high = min(values), max(values)
            limit(low / LOG_ROOM, high * LOG_ROOM)
            subs = (1, 2, 5) if high / low < 100 else (1, 3) if high / low < 1e4 else (1,)
            axis.set_major_locator(LogLocator(subs=subs))
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.set_minor_locator(NullLocator())
    if panel.xscale == "linear" and all(x == round(x) for x in xs):
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, steps=[1, 2, 5, 10]))
    if panel.ylimits is not None:
        ax.set_ylim(*panel.ylimits)


def _label_ends(ax: Axes, lines: Sequence[Line], gap: float) -> None:
    """Name each line at the right edge; names that would touch are moved apart."""
    ax.set_xlim(ax.get_xlim())
    ax.set_ylim(ax.get_ylim())
    to_axes = ax.transData + ax.transAxes.inverted()
    ends = [max(zip(line.xs, line.ys, strict=True)) for line in lines]
    heights = [float(to_axes.transform(end)[1]) for end in ends]
    for line, end, height in zip(lines, ends, spread_apart(heights, gap, top=1.0), strict=True):
        leader = {
            "arrowstyle": "-", "color": line.colour, "lw": 0.6, "alpha": 0.5,
            "relpos": (0, 0.5),  # at the name's left edge, clear of other names
            "shrinkB": 0,
        }  # fmt: skip
        ax.annotate(
            line.label, end, (1.04, height), "data", "axes fraction", color=line.colour,
            fontsize=9, fontweight="bold", va="center", arrowprops=leader,
        )  # fmt: skip


def _finish(ax: Axes, panel: Panel) -> None:
    """Axes and titles, the same on every plot."""
    ax.set_title(panel.title, loc="left", color=INK, fontsize=11, pad=18 if panel.subtitle else 6)
    ax.annotate(
        panel.subtitle, (0, 1), (0, 4), "axes fraction", "offset points", color=GREY,
        fontsize=8.5, va="bottom",
    )  # fmt: skip
    ax.set_xlabel(panel.xlabel, color=INK, fontsize=9)
    ax.set_ylabel(panel.ylabel, color=INK, fontsize=9)
    ax.tick_params(labelsize=8.5, colors=GREY, which="both", length=3)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(GREY)
    ax.set_axisbelow(True)
