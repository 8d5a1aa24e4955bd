"""Charts over time: errors by step of recovery, quality by segment of a rollout."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from vmla_convert.pipelines.report.panels import (
    GREY,
    INIT_COLOURS,
    INK,
    MARKERS,
    Chart,
    Guide,
    Line,
    Panel,
    curve_line,
    init_looks,
)
from vmla_convert.pipelines.report.points import (
    Point,
    group_medians,
    setting_key,
    setting_names,
    size_groups,
)
from vmla_convert.pipelines.report.wording import format_number
from vmla_convert.results import Row

MOST_PANELS = 18
MOST_ROLLOUTS = 6
DASHES = ["-", "--", ":", "-."]
ROLLOUT_METRICS = {
    "background_psnr": ("background PSNR", "higher is better"),
    "digit_accuracy": ("digit accuracy", "higher is better"),
    "motion_error": ("motion error", "lower is better"),
}


def recovery_chart(points: Sequence[Point]) -> Chart | None:
    """velocity_error by step, a panel for each cache size and latent."""

    def errors(point: Point) -> dict[int, float]:
        return {step: error for step, error in point.errors.items() if error > 0}

    return _small_multiples(
        [
            Panel(title, latent, "step of recovery", "velocity error (share)", lines, yscale="log")
            for title, latent, lines in _recovery_panels(points, errors)
        ]
    )


def recovery_loss_chart(points: Sequence[Point], bound: float) -> Chart | None:
    """Flow loss above dense by step, likewise, with the bound."""

    def percent(point: Point) -> dict[int, float]:
        return {step: 100 * loss for step, loss in point.losses.items()}

    name = f"bound +{100 * bound:g} %"
    guide = Guide(100 * bound, name, named=False)
    ylabel = "flow loss above dense (%)"
    return _small_multiples(
        [
            Panel(
                title,
                "\n".join(filter(None, (latent, f"dashed: {name}"))),
                "step of recovery",
                ylabel,
                lines,
                yscale="symlog",
                guides=[guide],
            )
            for title, latent, lines in _recovery_panels(points, percent)
        ]
    )


def rollout_chart(rows: Sequence[Row], points: Sequence[Point]) -> Chart | None:
    """Quality per segment, dense beside converted, a panel for each metric that was measured."""
    panels = [
        Panel(
            f"Rollout: {name}",
            how,
            "segment of the rollout (index)",
            f"{name} ({unit})",
            lines,
            ylimits=(0.0, 1.05) if unit.startswith("share") else None,
        )
        for metric, (name, how) in ROLLOUT_METRICS.items()
        for unit, lines in _segment_lines(rows, points, metric)
    ]
    return _small_multiples(panels, most_columns=2)


def drift_chart(rows: Sequence[Row], points: Sequence[Point]) -> Chart | None:
    """How far each segment is from the first."""
    panels = [
        Panel(
            "Drift",
            "0: as the first segment; what the dense model does not have is the cache's",
            "segment of the rollout (index)",
            f"drift ({unit})",
            lines,
        )
        for unit, lines in _segment_lines(rows, points, "drift")
    ]
    return _small_multiples(panels)


def _small_multiples(panels: list[Panel], most_columns: int = 3) -> Chart | None:
    """Three columns where two do not come out even; panels of one measure on one scale."""
    if not panels:
        return None
    if len({panel.ylabel for panel in panels}) == 1:
        heights = [y for panel in panels for line in panel.lines for y in line.ys]
        panels = [replace(panel, cover=[min(heights), max(heights)]) for panel in panels]
    columns = 2 if len(panels) in (2, 4) else most_columns
    height = 2.7 if columns > 2 and len(panels) > columns else 3.4
    return Chart(panels, columns=min(columns, len(panels)), height=height)


def _recovery_panels(
    points: Sequence[Point], curve: Callable[[Point], dict[int, float]]
) -> list[tuple[str, str, list[Line]]]:
    """Title, latent and lines of each panel; where sizes are many, some spread over all."""
    recovered = [p for p in points if p.last_step > 0 and len(curve(p)) > 1]
    latents = list(dict.fromkeys(p.latent for p in sorted(recovered, key=lambda p: p.final_error)))
    sizes = size_groups(recovered)
    most = max(1, MOST_PANELS // max(1, len(latents)))
    if len(sizes) > most:
        # From the smallest to the largest, evenly.
        sizes = [sizes[round(i * (len(sizes) - 1) / max(1, most - 1))] for i in range(most)]
    panels: list[tuple[str, str, list[Line]]] = []
    for size in sizes:
        for latent in latents:
            here = [point for point in size if point.latent == latent]
            lines = _init_lines(here, curve)
            if lines:
                panels.append((_size_title(here), latent if len(latents) > 1 else "", lines))
    return panels


def _size_title(group: Sequence[Point]) -> str:
    ends = sorted({point.size for point in group})
    if not math.isfinite(ends[-1]):
        return "cache of unknown size"
    sizes = "–".join(dict.fromkeys(format_number(size) for size in (ends[0], ends[-1])))
    return f"{sizes} bytes per token"


def _init_lines(points: Sequence[Point], curve: Callable[[Point], dict[int, float]]) -> list[Line]:
    """A line per init: its best split, named in the label where the points differ in it."""
    looks = init_looks(point.init for point in points)
    several = len({point.split for point in points}) > 1
    best: dict[str, Point] = {}
    for point in sorted(points, key=lambda point: point.final_error):
        best.setdefault(point.init, point)
    lines = [
        curve_line(f"{init} {p.split}" if several else init, *looks[init], curve(p))
        for init, p in best.items()
    ]
    return [line for line in lines if line is not None]


def _segment_lines(
    rows: Sequence[Row], points: Sequence[Point], metric: str
) -> list[tuple[str, list[Line]]]:
    """Unit and lines of one metric, dense first; nothing where it was not measured."""
    measured = [row for row in rows if row.metric == metric and row.segment is not None]
    names = _rollout_names(measured, points)
    looks = _rollout_looks(names, points)
    lines: list[Line] = []
    for key, name in {"dense": "dense", **names}.items():
        curve = _segment_curve([row for row in measured if setting_key(row) == key], metric)
        colour, marker, dash = looks.get(key, (INK, "X", "-"))
        line = curve_line(name, colour, marker, curve)
        lines += [replace(line, dash=dash)] if line is not None else []
    return [(measured[0].unit, lines)] if lines else []


def _segment_curve(rows: list[Row], metric: str) -> dict[int, float]:
    """Medians by segment at the last step of recovery that was rolled out."""
    last = max((row.step or 0 for row in rows), default=0)
    now = [row for row in rows if (row.step or 0) == last]
    return group_medians(now, metric, lambda row: row.segment)


def _rollout_names(measured: Sequence[Row], points: Sequence[Point]) -> dict[str, str]:
    """What converted models are drawn, the most accurate, and how lines call them."""
    names = setting_names(points)
    errors = dict(zip(names, (point.final_error for point in points), strict=True))
    keys = [key for key in dict.fromkeys(map(setting_key, measured)) if key != "dense"]
    keys = sorted(keys, key=lambda key: errors.get(key, math.inf))[:MOST_ROLLOUTS]
    # Rows of a rollout alone name a run that no point has.
    short = {key: names.get(key, "-".join(key.split("-")[:2])) for key in keys}
    return short if len(set(short.values())) == len(short) else {k: names.get(k, k) for k in keys}


def _rollout_looks(
    names: Iterable[str], points: Sequence[Point]
) -> dict[str, tuple[str, str, str]]:
    """Colour of the init, as in every plot; its settings differ in marker and dashes."""
    inits = dict(zip(setting_names(points), (point.init for point in points), strict=True))
    colours = {init: look[0] for init, look in init_looks(inits.values()).items()}
    spare = [colour for colour in INIT_COLOURS.values() if colour not in colours.values()]
    looks: dict[str, tuple[str, str, str]] = {}
    for number, key in enumerate(names):
        colour = colours.get(inits.get(key, ""), (spare or [GREY])[number % max(1, len(spare))])
        place = sum(look[0] == colour for look in looks.values())
        looks[key] = colour, MARKERS[place % len(MARKERS)], DASHES[place % len(DASHES)]
    return looks
