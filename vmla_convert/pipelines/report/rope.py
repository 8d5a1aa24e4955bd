"""Charts of rope keys: which RoPE pairs each layer keeps, and what phases it assumes."""

from __future__ import annotations

import math
from collections.abc import Sequence

from vmla_convert.pipelines.report.panels import Chart, Grid
from vmla_convert.pipelines.report.points import PLAIN, Point, group_medians, point_key
from vmla_convert.results import Row

XLABEL = "RoPE pair of a head (index)"
ROW_INCHES, FRAME_INCHES = 0.17, 1.3


def rope_pairs_chart(
    rows: Sequence[Row], points: Sequence[Point], best: Point | None
) -> Chart | None:
    """How many rope keys of each layer turn as each pair."""
    own = _rows_of_best(rows, points, best, "rope_pair")
    if not own:
        return None
    cells, bands = _cells(own, "rope_pair")
    pairs = max(pair for _, pair in cells) + 1
    layers = sorted({layer for layer, _ in cells})
    whole = {(n, p): cells.get((n, p), 0.0) for n in layers for p in range(pairs)}
    grid = Grid(
        "Rope keys by pair",
        f"{_name(own[0], points)}; dark: chosen, a number where more than one key turns as a pair",
        XLABEL,
        "layer (index)",
        whole,
        bands,
        (0.0, max(2.0, *whole.values())),
        "Blues",
    )
    return Chart([grid], height=_height(len(layers)))


def phases_chart(rows: Sequence[Row], points: Sequence[Point], best: Point | None) -> Chart | None:
    """The expected phase of each layer and pair that is folded into content: length and angle."""
    kinds = {
        "phase_length": ("Length of the phase", (0.0, 1.0), "viridis", "mean |phase|"),
        "phase_angle": ("Angle of the phase", (-math.pi, math.pi), "twilight", "radians"),
    }
    how = {
        "phase_length": "1: always turned alike, nothing lost; 0: all turns equally often",
        "phase_angle": "of the mean over reads",
    }
    panels: list[Grid] = []
    layers = 0
    for metric, (title, limits, colours, scale) in kinds.items():
        own = _rows_of_best(rows, points, best, metric)
        if own:
            cells, bands = _cells(own, metric)
            layers = max(layers, len({layer for layer, _ in cells}))
            subtitle = f"{_name(own[0], points)}; {how[metric]}"
            panels.append(
                Grid(title, subtitle, XLABEL, "layer (index)", cells, bands, limits, colours, scale)
            )
    return Chart(panels, height=_height(layers)) if panels else None


def _height(layers: int) -> float:
    return FRAME_INCHES + ROW_INCHES * max(layers, 6)


def _rows_of_best(
    rows: Sequence[Row], points: Sequence[Point], best: Point | None, metric: str
) -> list[Row]:
    """Rows of the recommended point, or of the most accurate one that has any of the metric."""
    measured = [r for r in rows if r.metric == metric and None not in (r.layer, r.pair)]
    if not measured:
        return []
    errors = {p.key: p.final_error for p in points if p.kept == PLAIN}
    keys = {point_key(row) for row in measured}
    if best is not None and best.key in keys:
        shown = best.key
    else:
        shown = min(sorted(keys), key=lambda key: errors.get(key, math.inf))
    return [row for row in measured if point_key(row) == shown]


def _cells(rows: Sequence[Row], metric: str) -> tuple[dict[tuple[int, int], float], dict[int, str]]:
    """Median over seeds by layer and pair, and the axis of each pair."""
    cells = group_medians(rows, metric, lambda row: (row.layer or 0, row.pair or 0))
    return cells, {row.pair or 0: row.note or "" for row in rows}


def _name(row: Row, points: Sequence[Point]) -> str:
    names = (p.name for p in points if p.key == point_key(row) and p.kept == PLAIN)
    return next(names, row.run)
