"""Charts that set quality against what it costs: bytes, and time."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import NamedTuple

from vmla_convert.pipelines.report.panels import (
    INK,
    LIGHT,
    Chart,
    Guide,
    Line,
    Panel,
    init_looks,
    log_width,
)
from vmla_convert.pipelines.report.points import PLAIN, Dense, Kept, Point, size_groups
from vmla_convert.pipelines.report.wording import format_cut, format_number

MOST_BESIDE = 6
BESIDE_POINTS = 9.0
CROWDED_POINTS = 60.0
AXIS_POINTS = 420.0  # of print that the axis of sizes has at least, beside ticks and names
LEAST_TICK_SHARE = 0.092


class Placed(NamedTuple):
    """A setting in a panel.

    Attributes:
        point: The setting.
        start: Its value at step 0; None where there is none to draw.
        end: Its value at the last step; likewise.
        shift: How far it stands beside its place, in points of print.
    """

    point: Point
    start: float | None
    end: float | None
    shift: float = 0.0

    @property
    def reached(self) -> float:
        """The value at the last step, or at step 0 where there is none."""
        reached = self.start if self.end is None else self.end
        return math.inf if reached is None else reached


def quality_chart(
    points: Sequence[Point], dense: Dense | None, best: Point | None, bound: float
) -> Chart | None:
    """Flow loss above dense, then velocity_error, against the bytes of a token in a layer.

    Args:
        points: All settings.
        dense: Drawn among them where its size and its loss are known.
        best: The recommended one, which gets a ring.
        bound: Flow loss allowed above the dense model's, as a share of it.
    """
    sized = [point for point in points if math.isfinite(point.size)]
    losses = _placed(sized, lambda p: {s: 100 * x for s, x in p.losses.items()}, dense, best)
    errors = _placed(sized, lambda p: {s: x for s, x in p.errors.items() if x > 0}, None, best)
    panels: list[Panel] = []
    if losses:
        panels.append(_loss_panel(losses, dense, best, bound))
    if errors:
        panels.append(
            Panel(
                "Velocity error against bytes",
                _reading(errors, best) + "; the dense model has none",
                "cache (bytes per token and layer; change against the dense model's)",
                "velocity error (share)",
                _setting_lines(errors, best),
                xscale="log",
                yscale="log",
                xticks=_size_ticks(errors, None, best),
            )
        )
    return Chart(panels, height=4.2) if panels else None


def speed_chart(points: Sequence[Point], best: Point | None) -> Chart | None:
    """velocity_error against seconds of a step, relative to the dense model's."""
    timed = [
        (point, ratio)
        for point in points
        if (ratio := point.seconds_ratio) and _drawable(ratio) and _drawable(point.final_error)
    ]
    if not timed:
        return None
    front = _speed_front(timed)
    lines: list[Line] = []
    for init, look in init_looks(point.init for point, _ in timed).items():
        own = [(point, ratio) for point, ratio in timed if point.init == init]
        lines.append(
            Line(
                init,
                *look,
                [ratio for _, ratio in own],
                [point.final_error for point, _ in own],
                width=0,
                marker_size=7,
                notes=[_speed_note(point) if point in front else "" for point, _ in own],
            )
        )
    rings = [_ring(ratio, point.final_error) for point, ratio in timed if point == best]
    lines += rings
    panel = Panel(
        "Quality against speed",
        "each marker a setting; lower left is best" + ("; ring: recommended" if rings else ""),
        "seconds of a denoising step (dense model = 1)",
        "velocity error (share)",
        lines,
        yscale="log",
        guides=[Guide(1.0, "dense", upright=True)],
    )
    return Chart([panel], height=3.8)


def _speed_front(timed: Sequence[tuple[Point, float]]) -> list[Point]:
    """Settings that no other beats in both, the ones to choose from."""
    front: list[Point] = []
    for point, _ in sorted(timed, key=lambda pair: (pair[1], pair[0].final_error)):
        if not front or point.final_error < front[-1].final_error:
            front.append(point)
    return front


def _speed_note(point: Point) -> str:
    size = f"{format_number(point.size)} bytes" if math.isfinite(point.size) else point.split
    return ", ".join(filter(None, (size, point.kept.words)))


def _loss_panel(
    placed: list[Placed], dense: Dense | None, best: Point | None, bound: float
) -> Panel:
    """Flow loss above dense, with the dense model at its own place."""
    lines, name = _setting_lines(placed, best), f"bound +{100 * bound:g} %"
    if dense is not None and dense.size:
        lines.append(Line("dense", INK, "X", [dense.size], [0.0], width=0, marker_size=8))
    return Panel(
        "Flow loss against bytes",
        f"{_reading(placed, best)}; dashed: {name}",
        "cache (bytes per token and layer; change against the dense model's)",
        "flow loss above dense (%)",
        lines,
        xscale="log",
        yscale="symlog",
        guides=[Guide(100 * bound, name, named=False)],
        xticks=_size_ticks(placed, dense, best),
    )


def _reading(placed: Sequence[Placed], best: Point | None) -> str:
    """What the markers mean, of those that there are."""
    points = [place.point for place in placed]
    parts = ["hollow: step 0"]
    if any(point.last_step > 0 for point in points):
        parts.append("filled: recovered")
    if any(point.kept.cache_dtype for point in points):
        parts.append("8, 4: bits kept")
    parts.append("grey: best so far")
    return "; ".join(parts + (["ring: recommended"] if best in points else []))


def _placed(
    points: Sequence[Point],
    curve: Callable[[Point], dict[int, float]],
    dense: Dense | None,
    best: Point | None,
) -> list[Placed]:
    """The settings to draw, each at its size, and side by side where they are of the very same.

    Of a crowd at one size only the best of each init and way of keeping is drawn, and otherwise
    the best latent of these.
    """
    found: list[Placed] = []
    for point in points:
        finite = {step: y for step, y in curve(point).items() if math.isfinite(y)}
        start, end = finite.get(0), finite.get(point.last_step)
        if start is not None or end is not None:
            found.append(Placed(point, start, end))
    shown = [
        place
        for group in size_groups([place.point for place in found])
        for place in _thinned([p for p in found if p.point in group], best)
    ]
    sizes = _axis_sizes(shown, dense)
    return [
        place
        for size, group in _by_size(shown).items()
        for place in _side_by_side(group, _room(size, sizes))
    ]


def _thinned(group: list[Placed], best: Point | None) -> list[Placed]:
    """Of settings of about one size those to draw."""
    kinds: dict[tuple[str, Kept], Placed] = {}
    for place in sorted(group, key=lambda place: place.reached):
        kinds.setdefault((place.point.init, place.point.kept), place)
    latents = {kind: place.point.latent for kind, place in kinds.items()}
    shown = [p for p in group if p.point.latent == latents[p.point.init, p.point.kept]]
    if len(shown) > MOST_BESIDE:
        shown = [p for p in group if p in kinds.values() or p.point == best]
    return shown


def _by_size(placed: Sequence[Placed]) -> dict[float, list[Placed]]:
    """Settings by their very size, ascending."""
    groups = defaultdict[float, list[Placed]](list)
    for place in sorted(placed, key=lambda place: place.point.size):
        groups[place.point.size].append(place)
    return dict(groups)


def _axis_sizes(placed: Sequence[Placed], dense: Dense | None) -> list[float]:
    """Every size on the axis, ascending."""
    sizes = {place.point.size for place in placed}
    return sorted(sizes | ({dense.size} if dense is not None and dense.size else set()))


def _room(size: float, sizes: Sequence[float]) -> float:
    """Points of print that settings of one size may take, so that other sizes stay beside them."""
    apart = [abs(math.log(other / size)) for other in sizes if other != size]
    return AXIS_POINTS * min(apart, default=math.inf) / log_width(sizes[0], sizes[-1]) / 2


def _side_by_side(group: list[Placed], room: float) -> list[Placed]:
    """Settings of the very same size, around it."""
    group = sorted(group, key=lambda place: (place.point.init, place.point.split))
    between = len(group) - 1
    step = min(BESIDE_POINTS, CROWDED_POINTS / len(group), room / max(1, between))
    return [p._replace(shift=step * (number - between / 2)) for number, p in enumerate(group)]


def _setting_lines(placed: Sequence[Placed], best: Point | None) -> list[Line]:
    """The front, a stem per setting, a dotted line through the best of each init."""
    looks = init_looks(place.point.init for place in placed)
    lines = [_front(placed), *(_stem(place, *looks[place.point.init]) for place in placed)]
    for init, (colour, _) in looks.items():
        own = [place for place in placed if place.point.init == init]
        lines.append(_init_line(init, colour, own))
    lines += [
        _ring(place.point.size, place.reached, place.shift)
        for place in placed
        if place.point == best
    ]
    return lines


def _stem(place: Placed, colour: str, marker: str) -> Line:
    point = place.point
    ends = [place.start, place.end] if point.last_step else [place.start]
    ys = [y for y in ends if y is not None]
    return Line(
        _full_name(point),
        colour,
        marker,
        [point.size] * len(ys),
        ys,
        named=False,
        width=1.2,
        hollow=int(place.start is not None),
        marker_size=7.5 if point.kept == PLAIN else 9,
        glyph=_glyph(point),
        shift=place.shift,
    )


def _front(placed: Sequence[Placed]) -> Line:
    """The least value that any cache up to each size reaches."""
    best = _improving(placed)
    largest = max(place.point.size for place in placed)
    ends = [(place.point.size, place.reached) for place in best]
    ends += [(largest, ends[-1][1])] if ends[-1][0] < largest else []
    return Line(
        "best so far",
        LIGHT,
        "",
        [x for x, _ in ends],
        [y for _, y in ends],
        named=False,
        width=6,
        alpha=0.6,
        stepped=True,
        shift=_middle_shift(best),
    )


def _init_line(init: str, colour: str, own: Sequence[Placed]) -> Line:
    """A dotted line through what an init gains with size, which carries its name."""
    best = _improving(own)
    return Line(
        init,
        colour,
        "",
        [place.point.size for place in best],
        [place.reached for place in best],
        width=1.2,
        dash=":",
        alpha=0.6,
        shift=_middle_shift(own),
    )


def _improving(placed: Sequence[Placed]) -> list[Placed]:
    """The best of each size, where it is better than all smaller ones."""
    best: list[Placed] = []
    for group in _by_size(placed).values():
        here = min(group, key=lambda place: place.reached)
        if not best or here.reached < best[-1].reached:
            best.append(here)
    return best


def _middle_shift(placed: Sequence[Placed]) -> float:
    """Where a line through several settings runs, so that it meets their markers."""
    return statistics.median_low(place.shift for place in placed)


def _ring(x: float, y: float, shift: float = 0.0) -> Line:
    return Line(
        "recommended", INK, "o", [x], [y], named=False, width=0, hollow=1, marker_size=15,
        shift=shift,
    )  # fmt: skip


def _size_ticks(
    placed: Sequence[Placed], dense: Dense | None, best: Point | None
) -> dict[float, str]:
    """A tick at each size, but for those too close to another's: that of the recommended stays."""
    sizes = _axis_sizes(placed, dense)
    least = LEAST_TICK_SHARE * log_width(sizes[0], sizes[-1])
    ticks: dict[float, str] = {}
    if dense is not None and dense.size:
        ticks[dense.size] = f"{format_number(dense.size)}\ndense"
    points = [group[0].point for group in _by_size(placed).values()]
    points.sort(key=lambda point: best is None or point.size != best.size)
    for point in points:
        if all(abs(math.log(point.size / other)) >= least for other in ticks):
            cut = f"\n−{format_cut(point.cut)}" if point.cut is not None else ""
            ticks[point.size] = format_number(point.size) + cut
    return dict(sorted(ticks.items()))


def _full_name(point: Point) -> str:
    return ", ".join(filter(None, (point.name, point.latent)))


def _glyph(point: Point) -> str:
    return {"int8": "8", "int4": "4"}.get(point.kept.cache_dtype, "+" if point.kept.words else "")


def _drawable(value: float | None) -> bool:
    """Whether a value has a place on a log axis."""
    return value is not None and math.isfinite(value) and value > 0
