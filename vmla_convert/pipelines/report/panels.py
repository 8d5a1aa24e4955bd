"""What a plot shows, as panels of labelled lines or cells; no drawing here.

Everything that is drawn is in these, so that a plot's CSV can hold all of it.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

INK, GREY, LIGHT = "#1a1a1a", "#595959", "#d5d5d2"

# Okabe-Ito without its yellow, which is too pale for lines on white.
INIT_COLOURS = {
    "calibrated": "#0072B2",
    "spectral": "#D55E00",
    "random": "#009E73",
}
OTHER_COLOURS = ["#000000"]
LEAST_LOG_WIDTH = math.log(4)  # sizes that rounding keeps apart are not to look far apart
MARKERS = ["o", "s", "D", "^", "v", "P", "X"]


@dataclass(frozen=True)
class Line:
    """One line of a panel, or markers alone.

    Attributes:
        label: In the CSV, and at the line's end where `named`.
        colour: Of line, markers and label.
        marker: As matplotlib names it; empty for none.
        xs: At least one.
        ys: As many.
        named: Whether the label is drawn.
        width: Of the line in points; 0 draws markers alone.
        dash: As matplotlib names it.
        hollow: How many markers, from the first on, are not filled.
        marker_size: In points.
        glyph: A letter inside each marker.
        notes: Words beside each marker.
        shift: To the right, in points, so that markers at one place stand side by side.
        alpha: Opacity.
        stepped: Whether the line keeps its height up to the next x.
    """

    label: str
    colour: str
    marker: str
    xs: list[float]
    ys: list[float]
    named: bool = True
    width: float = 1.8
    dash: str = "-"
    hollow: int = 0
    marker_size: float = 4.0
    glyph: str = ""
    notes: list[str] = field(default_factory=list)
    shift: float = 0.0
    alpha: float = 1.0
    stepped: bool = False


@dataclass(frozen=True)
class Guide:
    """A dashed line across a panel, with its name on it where `named`."""

    value: float
    label: str
    upright: bool = False
    named: bool = True


@dataclass(frozen=True)
class Panel:
    """One pair of axes: what it shows and its lines.

    Attributes:
        title: What is shown.
        subtitle: How to read it.
        xlabel: With its unit.
        ylabel: With its unit.
        lines: At least one, each with at least one point.
        xscale: As matplotlib names it.
        yscale: Likewise.
        guides: Lines to compare with.
        ylimits: Of the axis; None chooses them.
        cover: Heights that the axis has to reach, so that panels can be compared.
        xticks: Labels by place; None chooses them.
    """

    title: str
    subtitle: str
    xlabel: str
    ylabel: str
    lines: list[Line]
    xscale: str = "linear"
    yscale: str = "linear"
    guides: list[Guide] = field(default_factory=list)
    ylimits: tuple[float, float] | None = None
    cover: list[float] = field(default_factory=list)
    xticks: dict[float, str] | None = None


@dataclass(frozen=True)
class Grid:
    """One pair of axes with a coloured cell per layer and index.

    Attributes:
        title: What is shown.
        subtitle: How to read it.
        xlabel: Of the index.
        ylabel: Of the layers.
        cells: Value by (layer, index).
        bands: Name of the part of the axis that each index belongs to.
        limits: Of the colours.
        colours: A colour map, as matplotlib names it.
        scale: Name of the colour scale; empty draws the values into the cells instead.
    """

    title: str
    subtitle: str
    xlabel: str
    ylabel: str
    cells: dict[tuple[int, int], float]
    bands: dict[int, str]
    limits: tuple[float, float]
    colours: str
    scale: str = ""


@dataclass(frozen=True)
class Chart:
    """One picture.

    Attributes:
        panels: From left to right, then down.
        columns: Panels in a row.
        height: Of a row of panels, in inches.
    """

    panels: Sequence[Panel | Grid]
    columns: int = 1
    height: float = 3.4


def chart_csv(chart: Chart) -> str:
    """Everything that a chart draws: panel, line, x, y; a line of a grid is a layer."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["panel", "line", "x", "y"])
    for panel in chart.panels:
        if isinstance(panel, Grid):
            cells = sorted(panel.cells.items())
            writer.writerows([panel.title, f"layer {y}", x, v] for (y, x), v in cells)
            continue
        title = " ".join(filter(None, (panel.title, panel.subtitle)))
        for line in panel.lines:
            pairs = zip(line.xs, line.ys, strict=True)
            writer.writerows([title, line.label, x, y] for x, y in pairs)
        for guide in panel.guides:
            place = [guide.value, ""] if guide.upright else ["", guide.value]
            writer.writerow([title, guide.label, *place])
    return text.getvalue()


def log_width(low: float, high: float) -> float:
    """How wide, in natural logs, an axis is that has room around all from `low` to `high`."""
    return 1.2 * max(LEAST_LOG_WIDTH, math.log(high / low))


def curve_line(label: str, colour: str, marker: str, curve: Mapping[int, float]) -> Line | None:
    """A line through the finite values of a curve; None when there are none."""
    finite = sorted((x, y) for x, y in curve.items() if math.isfinite(y))
    if not finite:
        return None
    return Line(label, colour, marker, [float(x) for x, _ in finite], [y for _, y in finite])


def init_looks(inits: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Colour and marker of each init; the known ones look the same in every report."""
    names = sorted(set(inits))
    others = [name for name in names if name not in INIT_COLOURS]
    known = [*INIT_COLOURS, *others]
    colours = {n: OTHER_COLOURS[i % len(OTHER_COLOURS)] for i, n in enumerate(others)}
    return {
        name: ((INIT_COLOURS | colours)[name], MARKERS[known.index(name) % len(MARKERS)])
        for name in names
    }
