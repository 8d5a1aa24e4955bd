"""Tables of a report: every cache, equal errors, memory, speed, failures, and provenance."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from vmla_convert import __version__
from vmla_convert.report.settings import (
    DENSE,
    UNQUANTISED,
    Setting,
    group_medians,
    key_of,
    read_dense,
    read_settings,
    setting_names,
)
from vmla_convert.report.wording import (
    ABSENT,
    format_cut,
    format_excess,
    format_memory,
    format_number,
    format_range,
    format_seconds,
)
from vmla_convert.results import Metric, Row

Table = list[list[str]]
SECONDS = (Metric.SWEEP_SECONDS, Metric.CONVERT_SECONDS, Metric.RECOVER_SECONDS)


def decisive_table(rows: Sequence[Row]) -> Table:
    """Bytes and errors of each cache: header, the dense model, then a line per setting."""
    dense, settings = read_dense(rows), read_settings(rows)
    recovered = any(setting.last_step for setting in settings)
    quality = ["velocity_error", "flow loss above dense"]
    head = ["cache", "bytes per token", "cut", *quality]
    head += [f"{name}, recovered" for name in quality] if recovered else []
    table = [head]
    if dense is not None:
        after = [ABSENT, ABSENT] if recovered else []
        table.append([DENSE, format_number(dense.nbytes), "0 %", "0", "+0 %", *after])
    return table + [_line(setting, recovered) for setting in settings]


def equal_errors(rows: Sequence[Row], settings: Sequence[Setting]) -> list[str]:
    """A sentence per dtype of a quantised dense cache: bytes of the codec at the same error."""
    measured = [row for row in rows if row.metric == Metric.BYTES_AT_ERROR]
    last = max((row.step or 0 for row in measured), default=0)
    at_end = [row for row in measured if (row.step or 0) == last]
    found = group_medians(at_end, Metric.BYTES_AT_ERROR, lambda row: row.cache_dtype)
    dense = {each.key.dtype: each for each in settings if each.product == DENSE}
    least = min((each.nbytes for each in settings if each.product == "codec"), default=0.0)
    sentences: list[str] = []
    for dtype, nbytes in sorted(found.items(), key=lambda item: -item[1]):
        if (setting := dense.get(dtype)) is not None:
            most = "at most " if nbytes <= least else ""
            when = ", as converted," if not last and any(s.last_step for s in settings) else ""
            sentences.append(
                f"At the error of dense {dtype}, {format_number(setting.error)}, which takes "
                f"{format_number(setting.nbytes)} bytes, the codec{when} takes {most}"
                f"{format_number(nbytes)}: {setting.nbytes / nbytes:.2g} times fewer."
            )
    return sentences


def memory_table(rows: Sequence[Row], settings: Sequence[Setting]) -> Table:
    """Bytes of the cache of one clip by length of the clip, a line per size."""
    measured = [row for row in rows if row.metric == Metric.CACHE_BYTES and row.batch in (None, 1)]
    # An unquantised codec takes the same bytes as the quantised codec of its size.
    measured = [row for row in measured if key_of(row).dtype != UNQUANTISED]
    lengths = sorted({row.clip_seconds or 0.0 for row in measured})
    amounts = group_medians(
        measured, Metric.CACHE_BYTES, lambda r: (key_of(r), r.clip_seconds or 0.0)
    )
    names = setting_names(settings)
    sizes: defaultdict[tuple[float | None, ...], list[str]] = defaultdict(list)
    for key in dict.fromkeys(key for key, _ in amounts):
        cells = tuple(amounts.get((key, length)) for length in lengths)
        sizes[cells].append(names.get(key, key.run))
    order = sorted(sizes.items(), key=lambda item: -max(cell or 0 for cell in item[0]))
    lines = [[_shared_name(who), *map(format_memory, cells)] for cells, who in order]
    heads = [f"{length:g} s" if length else "window" for length in lengths]
    return [["cache", *heads], *lines] if lines else []


def streams_table(rows: Sequence[Row], settings: Sequence[Setting]) -> Table:
    """Clips with a full window that fit on one GPU, a line per size."""
    # An unquantised codec takes the same bytes as the quantised codec of its size.
    measured = [r for r in rows if r.metric == Metric.STREAMS and key_of(r).dtype != UNQUANTISED]
    counts = group_medians(measured, Metric.STREAMS, lambda r: (key_of(r), r.card_gb or 0))
    cards = sorted({card for _, card in counts})
    names = setting_names(settings)
    keys = sorted(
        {key for key, _ in counts}, key=lambda key: (key.run != DENSE, -(key.nbytes or 0))
    )
    lines = [
        [names.get(key, key.run), *(format_number(counts.get((key, card))) for card in cards)]
        for key in keys
    ]
    return [["cache", *(f"on {card} GB" for card in cards)], *lines] if lines else []


def speed_table(rows: Sequence[Row], settings: Sequence[Setting]) -> Table:
    """Seconds of a denoising step, and the ratio to the dense model's seconds."""
    names = setting_names(settings)
    seconds = group_medians(rows, Metric.STEP_SECONDS, key_of)
    ratios = group_medians(rows, Metric.SECONDS_RATIO, key_of)
    keys = sorted({**seconds, **ratios}, key=lambda key: (key.run != DENSE, key.nbytes or 0))
    lines = [
        [
            names.get(key, key.run),
            format_seconds(seconds.get(key)),
            "1" if key.run == DENSE else format_number(ratios.get(key)),
        ]
        for key in keys
    ]
    return [["cache", "step", "step / dense"], *lines] if lines else []


def failed_table(rows: Sequence[Row]) -> Table:
    """Failed points with the reasons."""
    failed: defaultdict[tuple[str, str], set[int]] = defaultdict(set)
    for row in rows:
        if row.metric == Metric.FAILED:
            failed[row.run, row.note or "no reason was written"].add(row.seed)
    lines = [[name, ", ".join(map(str, sorted(s))), why] for (name, why), s in failed.items()]
    return [["point", "seeds", "why"], *lines] if lines else []


def provenance_table(rows: Sequence[Row], recipe: Mapping[str, Any]) -> Table:
    """Origin of the figures: rows, seeds, devices, versions, seconds, learning rates."""
    facts = [
        ["fact", "value"],
        ["rows", str(len(rows))],
        ["seeds", ", ".join(map(str, sorted({row.seed for row in rows})))],
        ["devices", ", ".join(sorted({row.device for row in rows}))],
        ["report written by", f"vmla_convert {__version__}"],
    ]
    versions = recipe.get("versions") or {}
    facts += [[f"measured by {name}", str(value)] for name, value in versions.items()]
    for metric in SECONDS:
        # The note of a sweep's row names the stage that all points share.
        stages: defaultdict[str, float] = defaultdict(float)
        for row in rows:
            if row.metric == metric:
                stages[row.note or ""] += row.value
        facts += [
            [": ".join(filter(None, (metric, stage))), format_seconds(amount)]
            for stage, amount in stages.items()
        ]
    rates = sorted({row.value for row in rows if row.metric == Metric.LEARNING_RATE})
    return [*facts, ["learning rates", ", ".join(map(format_number, rates))]] if rates else facts


def _line(setting: Setting, recovered: bool) -> list[str]:
    cells = [
        setting.label,
        format_number(setting.nbytes),
        format_cut(setting.cut),
        _error(setting, 0),
        format_excess(setting.losses.get(0)),
    ]
    if recovered:
        last = setting.last_step
        cells += [_error(setting, last), format_excess(setting.loss)] if last else [ABSENT] * 2
    return cells


def _error(setting: Setting, step: int) -> str:
    """velocity_error at a step; at the last step with the spread over seeds."""
    spread = setting.error_spread if step == setting.last_step else None
    return format_range(setting.errors.get(step), spread)


def _shared_name(who: Sequence[str]) -> str:
    """One name for settings that take the same memory."""
    return who[0] if len(who) == 1 else f"{who[0]} and {len(who) - 1} more of this size"
