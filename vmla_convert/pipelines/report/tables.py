"""Tables of a report: every setting, what failed, memory, speed, and where figures come from."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from vmla_convert.pipelines.report.points import (
    Dense,
    Point,
    group_medians,
    is_step_ratio,
    median_of,
    read_dense,
    read_points,
    setting_key,
    setting_names,
    shared_seconds,
)
from vmla_convert.pipelines.report.wording import (
    ABSENT,
    format_cut,
    format_excess,
    format_memory,
    format_number,
    format_range,
    format_seconds,
)
from vmla_convert.results import Row

Table = list[list[str]]
PROVENANCE_FIELDS = ("latent",)
SECONDS_TO_CONVERT = "seconds to convert"
SECONDS = ("sweep_seconds", "convert_seconds", "recover_seconds")


class Column(NamedTuple):
    """A column of the decisive table: its head, a point's cell, the dense model's cell."""

    head: str
    cell: Callable[[Point], str]
    dense: str


def decisive_table(rows: Sequence[Row]) -> Table:
    """The table that decides: header, the dense model, then a line per setting.

    Args:
        rows: Rows of a sweep or of one conversion.

    Returns:
        Lines of cells; the first line is the header. The dense model's line is there only when
        rows about it are; columns that tell no two settings apart are left out.
    """
    dense, points = read_dense(rows), read_points(rows)
    columns = [*_setting_columns(points, dense), *_quality_columns(points, dense)]
    table = [[column.head for column in columns]]
    if dense is not None:
        table.append([column.dense for column in columns])
    return table + [[column.cell(point) for column in columns] for point in points]


def failed_table(rows: Sequence[Row]) -> Table:
    """Points that failed and why; empty where none did."""
    failed: defaultdict[tuple[str, str], set[int]] = defaultdict(set)
    for row in rows:
        if row.metric == "failed":
            failed[row.point or row.run, row.note or "no reason was written"].add(row.seed)
    if not failed:
        return []
    lines = [[name, ", ".join(map(str, sorted(s))), why] for (name, why), s in failed.items()]
    return [["setting", "seeds", "why"], *lines]


def memory_table(rows: Sequence[Row], points: Sequence[Point]) -> Table:
    """Bytes of a whole cache by clip length and batch, a line per size; empty without rows."""
    measured = [row for row in rows if row.metric == "cache_bytes"]
    if not measured:
        return []
    lengths = sorted({(row.clip_seconds or 0.0, row.frames or 0) for row in measured})
    if all(seconds == 0 for seconds, _ in lengths):
        heads = [f"{frames} frames" for _, frames in lengths]
    else:
        heads = [f"{seconds:g} s" if seconds else "window" for seconds, _ in lengths]
    cells = group_medians(
        measured,
        "cache_bytes",
        lambda r: (setting_key(r), r.batch or 1, r.clip_seconds or 0.0, r.frames or 0),
    )
    settings = list(dict.fromkeys((key, batch) for key, batch, _, _ in cells))
    settings.sort(key=lambda setting: (setting[1], setting[0] != "dense"))
    names = setting_names(points)
    sizes: defaultdict[tuple[int, tuple[float | None, ...]], list[str]] = defaultdict(list)
    for key, batch in settings:
        amounts = tuple(cells.get((key, batch, *length)) for length in lengths)
        sizes[batch, amounts].append(names.get(key, key))
    order = sorted(sizes.items(), key=lambda item: (item[0][0], -max(a or 0 for a in item[0][1])))
    lines = [
        [_shared_name(who), str(batch), *map(format_memory, amounts)]
        for (batch, amounts), who in order
    ]
    return [["cache", "batch", *heads], *lines]


def without_memory(rows: Sequence[Row], points: Sequence[Point]) -> list[str]:
    """Names of the models that `memory_table` leaves out, as no row tells their memory."""
    told = {setting_key(row) for row in rows if row.metric == "cache_bytes"}
    names = setting_names(points)
    if read_dense(rows) is not None:
        names = {"dense": "dense", **names}
    return [name for key, name in names.items() if key not in told]


def speed_table(rows: Sequence[Row], points: Sequence[Point]) -> Table:
    """Seconds of a denoising step and their ratio to the dense model's; empty without rows."""
    timed = [row for row in rows if row.metric == "step_seconds" or is_step_ratio(row)]
    groups: defaultdict[tuple[str, str, int], list[Row]] = defaultdict(list)
    for row in timed:
        groups[setting_key(row), row.backend or ABSENT, row.frames or 0].append(row)
    # Elsewhere ratios may compare anything: without a single step there is no table of steps.
    if not any(row.metric == "step_seconds" or row.init for row in timed):
        return []
    names = setting_names(points)
    several = len({(backend, frames) for _, backend, frames in groups}) > 1
    head = ["setting", *(["backend", "frames"] if several else [])]
    table = [[*head, "step", "step / dense"]]
    for key, backend, frames in sorted(groups, key=lambda k: (k[0] != "dense", k[2], k[0], k[1])):
        own = groups[key, backend, frames]
        seconds = median_of(own, "step_seconds")
        ratio = median_of(own, "seconds_ratio")
        dense = median_of(groups.get(("dense", ABSENT, frames), []), "step_seconds")
        if ratio is None and seconds is not None and dense:
            ratio = seconds / dense
        extra = [backend, str(frames or ABSENT)] if several else []
        name = names.get(key, key)
        table.append([name, *extra, format_seconds(seconds), format_number(ratio)])
    return table


def provenance_table(rows: Sequence[Row], recipe: Mapping[str, Any]) -> Table:
    """Where the figures come from: rows, seeds, devices, versions, command, settings, seconds.

    Args:
        rows: All rows.
        recipe: `recipe.json` of the run; empty where there is none.
    """
    seeds = ", ".join(map(str, sorted({row.seed for row in rows})))
    devices = ", ".join(sorted({row.device for row in rows}))
    facts = [["fact", "value"], ["rows", str(len(rows))], ["seeds", seeds], ["devices", devices]]
    if recipe.get("command"):
        facts.append(["command", str(recipe["command"])])
    versions = recipe.get("versions") or {}
    facts += [[f"version of {name}", str(value)] for name, value in versions.items()]
    for name in PROVENANCE_FIELDS:
        values = sorted({value for row in rows if (value := getattr(row, name)) is not None})
        if values:
            facts.append([name, ", ".join(values)])
    return facts + _seconds_facts(rows)


def _seconds_facts(rows: Sequence[Row]) -> Table:
    """How long everything took, and what of it was done once for all settings of a sweep."""
    shared, facts = shared_seconds(rows), list[list[str]]()
    for metric in SECONDS:
        seconds = [row.value for row in rows if row.metric == metric]
        if not seconds:
            continue
        aside = ", without what settings share" if shared and metric == "convert_seconds" else ""
        facts.append([f"{metric}, all runs{aside}", f"{sum(seconds):.1f}"])
        if metric == "sweep_seconds":
            facts += [
                [f"of these {stage}, once for all settings", f"{amount:.1f}"]
                for stage, amount in shared.items()
            ]
    return facts


def settings_table(recipe: Mapping[str, Any]) -> Table:
    """Every setting of the run's recipe that is not left open; empty without a recipe."""
    settings = [
        [name, text]
        for name, value in _leaves(recipe.get("recipe") or {})
        if (text := _plain(value)) != ""
    ]
    return [["setting", "value"], *settings] if settings else []


def _setting_columns(points: Sequence[Point], dense: Dense | None) -> list[Column]:
    scalars = format_number(dense.scalars if dense else None)
    columns = [
        Column("init", lambda p: p.init, "dense"),
        Column("latent", lambda p: p.latent or ABSENT, ABSENT),
    ]
    columns.append(Column("scalars/token", _scalars, scalars))
    if any(p.kept.words for p in points):
        columns.append(Column("kept as", lambda p: p.kept.words or "model", "model"))
    if any(p.nbytes is not None for p in points):
        nbytes = format_number(dense.nbytes if dense else None)
        columns.append(Column("bytes/token", lambda p: format_number(p.nbytes), nbytes))
    columns.append(Column("cache cut", lambda p: format_cut(p.cut), "0 %"))
    if len({p.recovery_steps for p in points}) > 1:
        columns.append(Column("recovery steps", lambda p: str(p.recovery_steps or 0), ABSENT))
    return columns


def _quality_columns(points: Sequence[Point], dense: Dense | None) -> list[Column]:
    recovered = any(point.last_step > 0 for point in points)
    columns = _recovery_columns() if recovered else _step0_columns(dense)
    if any(point.seconds_ratio is not None for point in points):
        columns.append(Column("step / dense", lambda p: format_number(p.seconds_ratio), "1"))
    return columns


def _recovery_columns() -> list[Column]:
    return [
        Column("velocity_error step 0", lambda p: format_number(p.errors.get(0)), "0"),
        Column("velocity_error after recovery", _after(_error), ABSENT),
        Column("flow loss above dense step 0", lambda p: format_excess(p.losses.get(0)), "+0 %"),
        Column(
            "flow loss above dense after recovery",
            _after(lambda p: format_excess(p.final_loss)),
            ABSENT,
        ),
    ]


def _step0_columns(dense: Dense | None) -> list[Column]:
    loss = format_number(dense.flow_loss if dense else None)
    return [
        Column("velocity_error", _error, "0"),
        Column("flow_loss", lambda p: format_number(p.flow_losses.get(0)), loss),
        Column("flow_loss_dense", lambda _: loss, loss),
        Column("flow loss above dense", lambda p: format_excess(p.losses.get(0)), "+0 %"),
        Column(SECONDS_TO_CONVERT, _seconds, ABSENT),
    ]


def _after(cell: Callable[[Point], str]) -> Callable[[Point], str]:
    """Empty for a setting that was not recovered."""
    return lambda point: cell(point) if point.last_step > 0 else ABSENT


def _error(point: Point) -> str:
    """velocity_error at the last step, with its spread over several seeds."""
    error = point.errors.get(point.last_step)
    return format_range(error, point.error_spread if point.seeds > 1 else None)


def _seconds(point: Point) -> str:
    shared = " (+ shared)" if point.shares and point.seconds is not None else ""
    return format_number(point.seconds) + shared


def _scalars(point: Point) -> str:
    sizes = "" if point.kv_lora_rank is None else f" ({point.split})"
    return format_number(point.scalars) + sizes


def _shared_name(who: Sequence[str]) -> str:
    """One name for settings of one size: which of them does not matter to memory."""
    return who[0] if len(who) == 1 else f"{who[0]} and {len(who) - 1} more of this size"


def _leaves(table: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Dotted names and values of nested settings."""
    leaves: list[tuple[str, Any]] = []
    for name, value in table.items():
        if isinstance(value, Mapping):
            leaves += _leaves(value, f"{prefix}{name}.")
        else:
            leaves.append((prefix + name, value))
    return leaves


def _plain(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return str(value)
