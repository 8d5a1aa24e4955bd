"""Rows gathered into settings. A setting is one measured cache with a curve of recovery."""

from __future__ import annotations

import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

from vmla_convert.report.wording import format_number
from vmla_convert.results import Metric, Row

K = TypeVar("K", bound=Hashable)

DENSE = "dense"
UNQUANTISED = "model"
ERRORS = (Metric.VELOCITY_ERROR, Metric.FLOW_LOSS)


class Key(NamedTuple):
    """Fields that identify a setting; rows of different seeds share them.

    Attributes:
        point: Key of the sweep's point; empty for the dense model.
        run: Name of the model.
        nbytes: Bytes per token and layer that were asked for.
        dtype: Cache dtype where it matters: `model` for an unquantised codec, the dtype of a
            quantised dense cache; else empty.
        recent: Recent frames whose dense keys and values are kept as well.
    """

    point: str
    run: str
    nbytes: float | None
    dtype: str
    recent: int


@dataclass(frozen=True)
class Dense:
    """The dense model, the baseline of every setting. Figures without rows are None.

    Attributes:
        nbytes: Bytes per token and layer.
        flow_loss: Flow loss on held-out clips.
        flow_loss_other_past: Flow loss with another clip in the past.
    """

    nbytes: float | None
    flow_loss: float | None
    flow_loss_other_past: float | None


@dataclass(frozen=True)
class Setting:
    """One cache: a model, a size and a cache dtype.

    Attributes:
        key: Identity of the setting.
        row: First row, for the fields that all rows of the setting share.
        method: Name that all sizes of one method share: a line of a plot.
        suffix: Start of the point's key, where settings of other points have the same name.
        nbytes: Bytes per token and layer; infinite where unknown.
        cut: Share of the dense cache that is saved.
        errors: Median velocity_error over seeds, by step of recovery.
        losses: Median flow loss above the dense model's, as a share of the dense model's loss, by
            step of recovery.
        error_spread: Least and greatest velocity_error of a seed at the last step.
        seeds: Number of seeds.
    """

    key: Key
    row: Row
    method: str
    suffix: str
    nbytes: float
    cut: float | None
    errors: dict[int, float]
    losses: dict[int, float]
    error_spread: tuple[float, float] | None
    seeds: int

    @property
    def product(self) -> str:
        """`codec`, `mla`, or `dense` for a quantised dense cache."""
        return self.row.product or DENSE

    @property
    def sizes(self) -> str:
        """Rank and rope width of MLA layers, `16+8`; empty for other products."""
        ranks = (self.row.kv_lora_rank, self.row.qk_rope_head_dim)
        return "+".join(str(rank) for rank in ranks if rank)

    @property
    def name(self) -> str:
        """The method with the size; unique."""
        if self.product == DENSE:
            return self.key.run + self.suffix
        return (
            f"{self.method} {self.sizes or f'at {format_number(self.nbytes)} bytes'}{self.suffix}"
        )

    @property
    def label(self) -> str:
        """Name for a table that shows the bytes in a column."""
        return self.method + self.suffix if self.product == "codec" else self.name

    @property
    def last_step(self) -> int:
        """The last measured step; 0 when nothing was recovered."""
        return max(self.errors or self.losses, default=0)

    @property
    def error(self) -> float:
        """velocity_error at the last measured step; infinite when there is none."""
        return self.errors.get(self.last_step, math.inf)

    @property
    def loss(self) -> float | None:
        """Flow loss above dense at the last measured step."""
        return self.losses.get(self.last_step)


def key_of(row: Row) -> Key:
    """The setting that a row belongs to."""
    dense = row.run.startswith(DENSE)
    # An MLA cache is not quantised, so the dtype does not distinguish settings.
    dtype = row.cache_dtype if dense or row.product == "codec" else None
    plain = (None, "auto", UNQUANTISED) if dense else (None, "auto")
    return Key(
        "" if dense else row.point or "",
        row.run,
        None if dense else row.bytes_per_token,
        "" if dtype in plain else str(dtype),
        row.dense_recent_frames or 0,
    )


def read_dense(rows: Sequence[Row]) -> Dense | None:
    """The dense model's figures, or None without rows of the dense model."""
    own = [row for row in rows if row.run == DENSE]
    if not own:
        return None
    asked = next((row.bytes_per_token for row in own if row.bytes_per_token), None)
    return Dense(
        nbytes=asked or median_of(own, Metric.CACHE_BYTES_PER_TOKEN),
        flow_loss=median_of(own, Metric.FLOW_LOSS),
        flow_loss_other_past=median_of(own, Metric.FLOW_LOSS_OTHER_PAST),
    )


def read_settings(rows: Sequence[Row]) -> list[Setting]:
    """Every cache with a measured error, sorted by bytes and then by error."""
    dense = read_dense(rows)
    groups: defaultdict[Key, list[Row]] = defaultdict(list)
    for row in rows:
        key = key_of(row)
        if row.metric != Metric.FAILED and (row.product or key.dtype):
            groups[key].append(row)
    settings = [
        _setting(key, own, dense)
        for key, own in groups.items()
        if any(row.metric in ERRORS for row in own)
    ]
    return sorted(_named(settings), key=lambda each: (each.nbytes, each.error))


def setting_names(settings: Iterable[Setting]) -> dict[Key, str]:
    """Names by key, with the dense model's first."""
    dense = Key("", DENSE, None, "", 0)
    return {dense: DENSE, **{setting.key: setting.name for setting in settings}}


def group_medians(
    rows: Iterable[Row], metric: Metric, key: Callable[[Row], K | None]
) -> dict[K, float]:
    """Median value of a metric for each key; rows with key None are left out."""
    groups: defaultdict[K, list[float]] = defaultdict(list)
    for row in rows:
        name = key(row) if row.metric == metric else None
        if name is not None:
            groups[name].append(_value(row))
    return {name: statistics.median(values) for name, values in groups.items()}


def median_of(rows: Iterable[Row], metric: Metric) -> float | None:
    """Median value of a metric, or None without rows of it."""
    return group_medians(rows, metric, lambda row: row.metric).get(metric)


def _value(row: Row) -> float:
    """The value; NaN (a diverged run) becomes infinite, so that medians show it."""
    return math.inf if math.isnan(row.value) else row.value


def _by_step(rows: Iterable[Row], metric: Metric) -> dict[int, float]:
    return dict(sorted(group_medians(rows, metric, lambda row: row.step or 0).items()))


def _setting(key: Key, rows: list[Row], dense: Dense | None) -> Setting:
    """A setting from its rows, still without method and name."""
    # The budget asked for is exact, but does not count frames that are kept dense.
    nbytes = None if key.recent else rows[0].bytes_per_token
    nbytes = nbytes or median_of(rows, Metric.CACHE_BYTES_PER_TOKEN)
    cut = median_of(rows, Metric.CACHE_CUT)
    if nbytes and dense is not None and dense.nbytes:
        cut = 1 - nbytes / dense.nbytes
    errors, losses = _by_step(rows, Metric.VELOCITY_ERROR), dict[int, float]()
    if dense is not None and dense.flow_loss:
        flow = _by_step(rows, Metric.FLOW_LOSS)
        losses = {step: loss / dense.flow_loss - 1 for step, loss in flow.items()}
    last = max(errors, default=0)
    ends = [_value(r) for r in rows if r.metric == Metric.VELOCITY_ERROR and (r.step or 0) == last]
    return Setting(
        key=key,
        row=rows[0],
        method="",
        suffix="",
        nbytes=nbytes or math.inf,
        cut=cut,
        errors=errors,
        losses=losses,
        error_spread=(min(ends), max(ends)) if ends else None,
        seeds=len({row.seed for row in rows}),
    )


def _named(settings: Sequence[Setting]) -> list[Setting]:
    """Settings with methods, and unique names."""
    named: list[Setting] = []
    for setting in settings:
        siblings = [each for each in settings if each.product == setting.product]
        named.append(replace(setting, method=_method(setting, siblings)))
    counts = Counter(setting.name for setting in named)
    return [
        replace(each, suffix=f" ({(each.key.point or each.key.run)[:6]})")
        if counts[each.name] > 1
        else each
        for each in named
    ]


def _method(setting: Setting, siblings: Sequence[Setting]) -> str:
    """Product, init and dtype, and the words that not all settings of the product share."""
    if setting.product == DENSE:
        return "dense, quantised"
    parts = [f"MLA {setting.row.init}" if setting.product == "mla" else setting.product]
    if setting.key.dtype == UNQUANTISED:
        parts.append("unquantised")
    others = map(_words, siblings)
    for word, *found in zip(_words(setting), *others, strict=True):
        if word and set(found) != {word}:
            parts.append(word)
    return ", ".join(parts)


def _words(setting: Setting) -> tuple[str, ...]:
    """Words that may distinguish methods of one product, at fixed indices."""
    row, recent = setting.row, setting.key.recent
    white = "white inputs" if row.init == "assumed" else "calibrated"
    return (
        white if setting.product == "codec" else "",
        row.latent or "",
        f"{row.recovery_steps} steps" if row.recovery_steps else "not recovered",
        f"{recent} recent frames dense" if recent else "",
    )
