"""Rows gathered into points: one setting of the converter, with its curve of recovery."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from vmla_convert.pipelines.report.wording import format_number
from vmla_convert.results import Row

K = TypeVar("K", bound=Hashable)

SAME_SIZE = 1.06
BYTES_PER_NUMBER = 2  # of a cache that is not quantised, wherever rows count bytes


class Kept(NamedTuple):
    """How a cache is kept, where that is not simply as the model computes it."""

    cache_dtype: str = ""
    dense_recent_frames: int = 0

    @property
    def words(self) -> str:
        """`int8`, `2 recent frames dense`; empty for the plain cache."""
        frames = self.dense_recent_frames
        parts = [
            self.cache_dtype,
            f"{frames} recent frames dense" if frames else "",
        ]
        return ", ".join(filter(None, parts))


PLAIN = Kept()


@dataclass(frozen=True)
class Dense:
    """The dense model, which every point is measured against; None where no row says it.

    Attributes:
        scalars: Numbers cached per token and layer.
        nbytes: Bytes they take.
        flow_loss: On held-out clips.
        flow_loss_other_past: The same when another clip is put in the past.
        step_seconds: Of one denoising step.
    """

    scalars: float | None
    nbytes: float | None
    flow_loss: float | None
    flow_loss_other_past: float | None
    step_seconds: float | None

    @property
    def size(self) -> float | None:
        """Bytes per token and layer, at two bytes a number where no row says them."""
        return _size(self.nbytes, self.scalars)


@dataclass(frozen=True)
class Point:
    """One setting of the converter; medians over its seeds.

    Attributes:
        key: What its rows are grouped by: `point`, or `run` where they have none.
        init: How the projections were initialised.
        kept: How its cache is kept: a quantised cache makes a setting of its own.
        latent: Joint or split; empty where rows do not tell.
        kv_lora_rank: Rank of the content latent; None where layers differ.
        qk_rope_head_dim: Width of the shared rope key; None where layers differ.
        scalars: Numbers cached per token and layer.
        nbytes: Bytes they take; None where no row says.
        cut: Share of the dense cache that is gone.
        recovery_steps: Steps of distillation that were asked for.
        errors: velocity_error by step of recovery.
        flow_losses: Flow loss by step.
        losses: Flow loss above the dense model's by step, as a share of the dense model's.
        error_spread: Least and greatest velocity_error over seeds at the last step.
        loss_spread: Likewise of `losses`.
        seeds: How many there are.
        seconds: Of the conversion; of its own work alone, where it `shares` the rest.
        shares: Whether a sweep calibrated and predicted for it together with others.
        step_seconds: Of one denoising step.
        seconds_ratio: The same over the dense model's; below 1 is faster.
    """

    key: str
    init: str
    kept: Kept
    latent: str
    kv_lora_rank: int | None
    qk_rope_head_dim: int | None
    scalars: float | None
    nbytes: float | None
    cut: float | None
    recovery_steps: int | None
    errors: dict[int, float]
    flow_losses: dict[int, float]
    losses: dict[int, float]
    error_spread: tuple[float, float] | None
    loss_spread: tuple[float, float] | None
    seeds: int
    seconds: float | None
    shares: bool
    step_seconds: float | None
    seconds_ratio: float | None

    @property
    def split(self) -> str:
        """Rank and rope width as one short name, `16+8`; what a token costs where layers differ."""
        if self.kv_lora_rank is None:
            return format_number(self.scalars)
        sizes = (self.kv_lora_rank, self.qk_rope_head_dim or None)
        return "+".join(format_number(n) for n in sizes if n is not None)

    @property
    def name(self) -> str:
        """Init, split and how it is kept: `calibrated 16+8 int8`."""
        return " ".join(filter(None, (self.init, self.split, self.kept.words)))

    @property
    def size(self) -> float:
        """Bytes per token and layer, which settings are sorted by; infinite where unknown.

        At two bytes a number where no row says bytes.
        """
        size = _size(self.nbytes, self.scalars)
        return math.inf if size is None else size

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


def group_medians(
    rows: Iterable[Row], metric: str, key: Callable[[Row], K | None]
) -> dict[K, float]:
    """Median value of a metric for each key, in the order of the keys' first rows.

    Rows whose key is None are left out.
    """
    groups: defaultdict[K, list[float]] = defaultdict(list)
    for row in rows:
        name = key(row) if row.metric == metric else None
        if name is not None:
            groups[name].append(row.value)
    return {name: _median_value(values) for name, values in groups.items()}


def median_of(rows: Iterable[Row], metric: str) -> float | None:
    """Median value of a metric, or None without rows of it."""
    values = [row.value for row in rows if row.metric == metric]
    return _median_value(values) if values else None


def setting_key(row: Row) -> str:
    """What a row's setting is told apart by: its point, and how the cache is kept."""
    return " ".join(filter(None, (point_key(row), kept_as(row).words)))


def setting_names(points: Sequence[Point]) -> dict[str, str]:
    """Short names by `setting_key`; those that share one get their latent too."""
    short = [point.name for point in points]
    latents = {point.latent for point in points}

    def name(point: Point) -> str:
        if short.count(point.name) == 1:
            return point.name
        return f"{point.name} ({(len(latents) > 1 and point.latent) or point.key})"

    return {" ".join(filter(None, (p.key, p.kept.words))): name(p) for p in points}


def point_key(row: Row) -> str:
    """What rows of one setting share, whatever their seed."""
    return row.point or row.run


def kept_as(row: Row) -> Kept:
    """How the cache was kept that a row measured."""
    dtype = "" if row.cache_dtype in (None, "model") else row.cache_dtype
    return Kept(dtype, row.dense_recent_frames or 0)


def read_dense(rows: Sequence[Row]) -> Dense | None:
    """The dense model's figures, or None when no row is about it."""
    dense_rows = [row for row in rows if row.run == "dense"]
    if not dense_rows:
        return None
    return Dense(
        scalars=median_of(dense_rows, "cache_scalars_per_token"),
        nbytes=median_of(dense_rows, "cache_bytes_per_token"),
        flow_loss=median_of(dense_rows, "flow_loss"),
        flow_loss_other_past=median_of(dense_rows, "flow_loss_other_past"),
        step_seconds=median_of(dense_rows, "step_seconds"),
    )


def read_points(rows: Sequence[Row]) -> list[Point]:
    """Every measured setting, sorted by cache size, then by error after recovery."""
    dense = read_dense(rows)
    groups: defaultdict[tuple[str, str], defaultdict[Kept, list[Row]]]
    groups = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if row.init is not None and row.metric != "failed":
            groups[point_key(row), row.init][kept_as(row)].append(row)
    swept = any(row.metric == "sweep_seconds" for row in rows)
    points = [
        _point(kept, own, kinds.get(PLAIN, own), dense, swept)
        for kinds in groups.values()
        for kept, own in kinds.items()
    ]
    measured = [point for point in points if point.errors or point.losses]
    return sorted(measured, key=lambda point: (point.size, point.final_error))


def size_groups(points: Sequence[Point]) -> list[list[Point]]:
    """Points by size, ascending; sizes that only rounding keeps apart count as one."""
    groups: list[list[Point]] = []
    for point in sorted(points, key=lambda point: point.size):
        if groups and point.size < SAME_SIZE * groups[-1][0].size:
            groups[-1].append(point)
        else:
            groups.append([point])
    return groups


def shared_seconds(rows: Iterable[Row]) -> dict[str, float]:
    """Seconds of what a sweep did once for all of its points, by stage; of all its runs."""
    seconds: defaultdict[str, float] = defaultdict(float)
    for row in rows:
        # What this stage does is each point's own, and told there.
        if row.metric == "sweep_seconds" and row.note != "converting":
            seconds[row.note or "shared work"] += row.value
    return dict(seconds)


def is_step_ratio(row: Row) -> bool:
    """Whether a row compares seconds of a whole step, not of an attention or of a layer alone."""
    return row.metric == "seconds_ratio" and not row.unit.startswith(("attention", "layer"))


def _size(nbytes: float | None, scalars: float | None) -> float | None:
    if nbytes is not None:
        return nbytes
    return None if scalars is None else BYTES_PER_NUMBER * scalars


def _point(
    kept: Kept, rows: list[Row], plain: list[Row], dense: Dense | None, swept: bool
) -> Point:
    """A point from its own rows; what does not depend on how it is kept, from the plain ones."""
    first = rows[0]
    scalars = median_of(plain, "cache_scalars_per_token")
    nbytes = median_of(rows, "cache_bytes_per_token")
    cut = _cut(rows, nbytes, scalars, dense)
    errors = group_medians(rows, "velocity_error", lambda row: row.step)
    flow_losses = group_medians(rows, "flow_loss", lambda row: row.step)
    losses: dict[int, float] = {}
    if dense is not None and dense.flow_loss:
        losses = {step: loss / dense.flow_loss - 1 for step, loss in sorted(flow_losses.items())}
    last = max(errors or losses, default=0)
    loss_spread = _spread(rows, "flow_loss", last)
    if loss_spread is not None and dense is not None and dense.flow_loss:
        low, high = loss_spread
        loss_spread = low / dense.flow_loss - 1, high / dense.flow_loss - 1
    step_seconds = median_of(rows, "step_seconds")
    return Point(
        key=point_key(first),
        init=first.init or "",
        kept=kept,
        latent=first.latent or "",
        kv_lora_rank=first.kv_lora_rank,
        qk_rope_head_dim=first.qk_rope_head_dim,
        scalars=scalars,
        nbytes=nbytes,
        cut=cut,
        recovery_steps=first.recovery_steps,
        errors=dict(sorted(errors.items())),
        flow_losses=flow_losses,
        losses=losses,
        error_spread=_spread(rows, "velocity_error", last),
        loss_spread=loss_spread,
        seeds=len({row.seed for row in rows}),
        seconds=median_of(plain, "convert_seconds"),
        # A conversion by itself tells how much of its seconds was factoring.
        shares=swept and not any(row.metric == "factor_seconds" for row in plain),
        step_seconds=step_seconds,
        seconds_ratio=_ratio(rows, step_seconds, dense),
    )


def _cut(
    rows: list[Row], nbytes: float | None, scalars: float | None, dense: Dense | None
) -> float | None:
    """Of bytes where both are known: quantising cuts too."""
    if dense is not None and dense.nbytes and nbytes is not None:
        return 1 - nbytes / dense.nbytes
    cut = median_of(rows, "cache_cut")
    if cut is None and scalars is not None and dense is not None and dense.scalars:
        return 1 - scalars / dense.scalars
    return cut


def _ratio(rows: list[Row], step_seconds: float | None, dense: Dense | None) -> float | None:
    measured = median_of(filter(is_step_ratio, rows), "seconds_ratio")
    if measured is not None or step_seconds is None or dense is None or not dense.step_seconds:
        return measured
    return step_seconds / dense.step_seconds


def _spread(rows: Iterable[Row], metric: str, step: int) -> tuple[float, float] | None:
    values = [
        math.inf if math.isnan(row.value) else row.value
        for row in rows
        if row.metric == metric and row.step == step
    ]
    return (min(values), max(values)) if values else None


def _median_value(values: list[float]) -> float:
    """The median; a run that diverged counts as infinitely bad, so that it is not hidden."""
    return statistics.median(math.inf if math.isnan(value) else value for value in values)
