"""Rows gathered into points: one setting of the converter, with its curve of recovery."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from vmla_convert.results import Row

K = TypeVar("K", bound=Hashable)

LAYER_HEADER = ["init", "layer", "scalars/token", "cache cut"]
RECOVERY_HEADER = [
    *LAYER_HEADER,
    "velocity_error step 0",
    "velocity_error after recovery",
    "flow loss above dense step 0",
    "flow loss above dense after recovery",
]
STEP0_HEADER = [
    *LAYER_HEADER,
    "velocity_error",
    "flow_loss",
    "flow_loss_dense",
    "flow loss above dense",
    "seconds",
]
ABSENT = "–"
SAME_SIZE = 1.06


@dataclass(frozen=True)
class Dense:
    """The dense model, which every point is measured against; None where no row says it."""

    scalars: float | None
    flow_loss: float | None
    flow_loss_other_past: float | None


@dataclass(frozen=True)
class Point:
    """One setting of the converter; medians over its seeds.

    Attributes:
        run: Its name in the rows.
        init: How the projections were initialised.
        layer: Its choices as one phrase; empty where rows tell none.
        kv_lora_rank: Rank of the content latent; None where layers differ.
        qk_rope_head_dim: Width of the shared rope key; None where layers differ.
        scalars: Numbers cached per token and layer.
        cut: Share of the dense cache that is gone.
        errors: velocity_error by step of recovery.
        flow_losses: Flow loss by step.
        losses: Flow loss above the dense model's by step, as a share of the dense model's.
        seconds: Of the conversion.
    """

    run: str
    init: str
    layer: str
    kv_lora_rank: int | None
    qk_rope_head_dim: int | None
    scalars: float | None
    cut: float | None
    errors: dict[int, float]
    flow_losses: dict[int, float]
    losses: dict[int, float]
    seconds: float | None

    @property
    def split(self) -> str:
        """Rank and rope width as one short name, `16+8`; what a token costs where layers differ."""
        if self.kv_lora_rank is None:
            return format_number(self.scalars)
        sizes = (self.kv_lora_rank, self.qk_rope_head_dim or None)
        return "+".join(format_number(n) for n in sizes if n is not None)

    @property
    def size(self) -> float:
        """Cache size to sort by; a point without one comes last."""
        return math.inf if self.scalars is None else self.scalars

    @property
    def last_step(self) -> int:
        """The last measured step; 0 when nothing was recovered."""
        return max(self.errors or self.losses, default=0)

    @property
    def final_error(self) -> float:
        """velocity_error at the last measured step; infinite when there is none."""
        return self.errors.get(self.last_step, math.inf)

    @property
    def final_loss(self) -> float | None:
        """Flow loss above dense at the last measured step."""
        return self.losses.get(self.last_step)


@dataclass(frozen=True)
class Recommendation:
    """The point to use.

    Attributes:
        point: The setting.
        within_bound: Whether its flow loss meets the bound; None when no row tells.
    """

    point: Point
    within_bound: bool | None


def group_medians(
    rows: Iterable[Row], metric: str, key: Callable[[Row], K | None]
) -> dict[K, float]:
    """Median value of a metric for each key, in the order of the keys' first rows.

    Rows whose key is None are left out.
    """
    groups: defaultdict[K, list[float]] = defaultdict(list)
    for row in rows:
        name = key(row)
        if row.metric == metric and name is not None:
            groups[name].append(row.value)
    return {name: _median_value(values) for name, values in groups.items()}


def read_dense(rows: Sequence[Row]) -> Dense | None:
    """The dense model's figures, or None when no row is about it."""
    dense_rows = [row for row in rows if row.run == "dense"]
    if not dense_rows:
        return None
    return Dense(
        scalars=_median(dense_rows, "cache_scalars_per_token"),
        flow_loss=_median(dense_rows, "flow_loss"),
        flow_loss_other_past=_median(dense_rows, "flow_loss_other_past"),
    )


def read_points(rows: Sequence[Row]) -> list[Point]:
    """Every measured setting, sorted by cache size, then by error after recovery."""
    dense = read_dense(rows)
    groups: defaultdict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        if row.init is not None:
            groups[row.run, row.init].append(row)
    points = [_point(group, dense) for group in groups.values()]
    measured = [point for point in points if point.errors or point.losses]
    return sorted(measured, key=lambda point: (point.size, point.final_error))


def recommend(points: Sequence[Point], bound: float) -> Recommendation | None:
    """The most accurate point at the largest cut whose flow loss stays within the bound.

    Args:
        points: As `read_points` gives them.
        bound: Flow loss allowed above the dense model's, as a share of it.

    Returns:
        When no point meets the bound, or none says its flow loss, the most accurate of all; None
        when no point has a finite error.
    """
    finite = [point for point in points if math.isfinite(point.final_error)]
    if not finite:
        return None
    known = [point for point in finite if point.final_loss is not None]
    meeting = [point for point in known if (point.final_loss or 0.0) <= bound]
    if meeting:
        return Recommendation(min(meeting, key=lambda p: (p.size, p.final_error)), True)
    best = min(finite, key=lambda point: (point.final_error, point.size))
    return Recommendation(best, False if known else None)


def size_groups(points: Sequence[Point]) -> list[list[Point]]:
    """Points by size, ascending; sizes that only rounding keeps apart count as one."""
    groups: list[list[Point]] = []
    for point in sorted(points, key=lambda point: point.size):
        if groups and point.size < SAME_SIZE * groups[-1][0].size:
            groups[-1].append(point)
        else:
            groups.append([point])
    return groups


def format_sizes(group: Sequence[Point]) -> str:
    """Numbers per token of a group of `size_groups`: one, or the least and the most."""
    return "–".join(dict.fromkeys(format_number(p.size) for p in (group[0], group[-1])))


def decisive_table(rows: Sequence[Row]) -> list[list[str]]:
    """The table that decides: header, the dense model, then a line per point.

    Args:
        rows: Rows of a sweep or of one conversion.

    Returns:
        Lines of cells; the first line is the header. The dense model's line is there only when
        rows about it are.
    """
    dense, points = read_dense(rows), read_points(rows)
    recovered = any(point.last_step > 0 for point in points)
    table = [RECOVERY_HEADER if recovered else STEP0_HEADER]
    if dense is not None:
        scalars, loss = format_number(dense.scalars), format_number(dense.flow_loss)
        losses = ["+0 %", ABSENT] if recovered else [loss, loss, "+0 %", ABSENT]
        errors = ["0", ABSENT] if recovered else ["0"]
        table.append(["dense", ABSENT, scalars, "0 %", *errors, *losses])
    if recovered:
        return table + [_recovery_cells(point) for point in points]
    return table + [_step0_cells(point, dense) for point in points]


def format_number(value: float | None) -> str:
    """Three significant digits; whole numbers in full."""
    if value is None:
        return ABSENT
    if not math.isfinite(value):
        return "diverged"
    return str(round(value)) if value == round(value) else f"{value:.3g}"


def format_cut(cut: float | None) -> str:
    """A share as a percentage with one decimal."""
    return ABSENT if cut is None else f"{100 * cut:.1f} %"


def format_excess(share: float | None) -> str:
    """Flow loss above dense, signed; one decimal below 10 %."""
    if share is None or not math.isfinite(share):
        return format_number(share)
    percent = 100 * share
    return f"{percent:+.1f} %" if abs(percent) < 10 else f"{percent:+.0f} %"


def _point(rows: list[Row], dense: Dense | None) -> Point:
    first = rows[0]
    scalars = _median(rows, "cache_scalars_per_token")
    cut = _median(rows, "cache_cut")
    if cut is None and scalars is not None and dense is not None and dense.scalars:
        cut = 1 - scalars / dense.scalars
    flow_losses = group_medians(rows, "flow_loss", lambda row: row.step)
    losses: dict[int, float] = {}
    if dense is not None and dense.flow_loss:
        losses = {step: loss / dense.flow_loss - 1 for step, loss in sorted(flow_losses.items())}
    errors = group_medians(rows, "velocity_error", lambda row: row.step)
    choices = (first.current_chunk, first.positions, first.latent, first.k_norm)
    return Point(
        run=first.run,
        init=first.init or "",
        layer=" ".join(choice for choice in choices if choice is not None),
        kv_lora_rank=first.kv_lora_rank,
        qk_rope_head_dim=first.qk_rope_head_dim,
        scalars=scalars,
        cut=cut,
        errors=dict(sorted(errors.items())),
        flow_losses=flow_losses,
        losses=losses,
        seconds=_median(rows, "convert_seconds"),
    )


def _setting_cells(point: Point) -> list[str]:
    sizes = "" if point.kv_lora_rank is None else f" ({point.split})"
    scalars = format_number(point.scalars) + sizes
    return [point.init, point.layer or ABSENT, scalars, format_cut(point.cut)]


def _recovery_cells(point: Point) -> list[str]:
    recovered = point.last_step > 0
    return [
        *_setting_cells(point),
        format_number(point.errors.get(0)),
        format_number(point.errors.get(point.last_step)) if recovered else ABSENT,
        format_excess(point.losses.get(0)),
        format_excess(point.final_loss) if recovered else ABSENT,
    ]


def _step0_cells(point: Point, dense: Dense | None) -> list[str]:
    return [
        *_setting_cells(point),
        format_number(point.errors.get(0)),
        format_number(point.flow_losses.get(0)),
        format_number(dense.flow_loss if dense else None),
        format_excess(point.losses.get(0)),
        format_number(point.seconds),
    ]


def _median(rows: Iterable[Row], metric: str) -> float | None:
    values = [row.value for row in rows if row.metric == metric]
    return _median_value(values) if values else None


def _median_value(values: list[float]) -> float:
    """The median; a run that diverged counts as infinitely bad, so that it is not hidden."""
    return statistics.median(math.inf if math.isnan(value) else value for value in values)
