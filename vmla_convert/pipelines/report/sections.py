"""The report's sections in the order in which a reader asks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vmla_convert.pipelines.report.answer import (
    Recommendation,
    answer_reasons,
    answer_sentence,
    recommend,
)
from vmla_convert.pipelines.report.commands import how_to_use
from vmla_convert.pipelines.report.curves import (
    drift_chart,
    recovery_chart,
    recovery_loss_chart,
    rollout_chart,
)
from vmla_convert.pipelines.report.pages import Section
from vmla_convert.pipelines.report.panels import Chart
from vmla_convert.pipelines.report.points import (
    Dense,
    Point,
    read_dense,
    read_points,
    setting_names,
    shared_seconds,
)
from vmla_convert.pipelines.report.quality import quality_chart, speed_chart
from vmla_convert.pipelines.report.rope import phases_chart, rope_pairs_chart
from vmla_convert.pipelines.report.spectra import (
    effective_rank_chart,
    spectra_chart,
    spectra_notes,
)
from vmla_convert.pipelines.report.tables import (
    SECONDS_TO_CONVERT,
    decisive_table,
    failed_table,
    memory_table,
    provenance_table,
    settings_table,
    speed_table,
    without_memory,
)
from vmla_convert.pipelines.report.wording import format_seconds, join_words
from vmla_convert.results import Row

STRIPS_SHOWN = 3
STRIPS_BYTES = 600_000  # of strips inside the page, which is to stay under 3 MB

# Heading, what the picture shows, and a sentence to read it by.
PLOTS = {
    "quality": (
        "Quality against bytes",
        "flow loss above dense and velocity_error of every setting against bytes per token",
        "Where settings are many, the best of each init and way of keeping is drawn; the table "
        "above has all.",
    ),
    "speed": (
        "Quality against speed",
        "velocity_error against seconds of a step, relative to the dense model",
        "Steps are timed side by side with the dense model's in one process.",
    ),
    "recovery": (
        "Velocity error from step 0 through recovery",
        "velocity_error against the step of recovery, for each cache size",
        "",
    ),
    "recovery_loss": (
        "Flow loss from step 0 through recovery",
        "flow loss above the dense model's against the step of recovery, for each cache size",
        "",
    ),
    "spectra": (
        "Spectra",
        "kept energy by rank and 99 %-energy rank per layer, of weights and on activations",
        "",
    ),
    "effective_rank": (
        "Effective rank, before and after recovery",
        "99 %-energy rank of the learned operator per layer and against R",
        "Whatever the init, the learned operator fills its rank: a full rank tells nothing of "
        "quality.",
    ),
    "rope_pairs": (
        "Chosen RoPE pairs",
        "which pairs of time, height and width the rope keys of each layer turn as",
        "",
    ),
    "phases": (
        "Phases folded into content",
        "length and angle of the expected phase of each layer and pair",
        "A pair that has no rope key is turned by its expected phase, once and for all.",
    ),
    "rollout": (
        "Rollout",
        "quality per segment of a rollout, dense and converted",
        "A cache that loses the past shows as a drop from segment to segment that the dense model "
        "does not have.",
    ),
    "drift": (
        "Drift",
        "how far each segment of a rollout is from the first, dense and converted",
        "",
    ),
}

# Settings that are named where all could be many.
_NAMED = 3


def draw_charts(rows: Sequence[Row], bound: float) -> dict[str, Chart]:
    """Every chart that the rows allow, by name; one without data is left out.

    Args:
        rows: All rows of the report.
        bound: Flow loss allowed above the dense model's, as a share of it.
    """
    points, dense = read_points(rows), read_dense(rows)
    recommended = recommend(points, bound)
    best = recommended.point if recommended is not None else None
    charts = {
        "quality": quality_chart(points, dense, best, bound),
        "speed": speed_chart(points, best),
        "recovery": recovery_chart(points),
        "recovery_loss": recovery_loss_chart(points, bound),
        "spectra": spectra_chart(rows, dense, best),
        "effective_rank": effective_rank_chart(rows),
        "rope_pairs": rope_pairs_chart(rows, points, best),
        "phases": phases_chart(rows, points, best),
        "rollout": rollout_chart(rows, points),
        "drift": drift_chart(rows, points),
    }
    return {name: chart for name, chart in charts.items() if chart is not None}


def report_sections(
    folder: Path,
    rows: Sequence[Row],
    bound: float,
    drawn: Sequence[str],
    recipe: Mapping[str, Any],
) -> list[Section]:
    """All sections, each only where its rows or files exist.

    Args:
        folder: Where plots, strips and the comparison lie.
        rows: All rows.
        bound: As for `draw_charts`.
        drawn: Names of the charts that are saved.
        recipe: `recipe.json` of the run; empty where there is none.
    """
    points, dense = read_points(rows), read_dense(rows)
    plots = {name: _plot_section(name, rows) for name in drawn}
    return [
        *_answer_sections(rows, points, dense, bound, recipe),
        *_table_section("What failed", failed_table(rows)),
        *(section for name, section in plots.items() if name not in ("rollout", "drift")),
        *_strip_sections(folder, points, recommend(points, bound)),
        *(section for name, section in plots.items() if name in ("rollout", "drift")),
        *_table_section("Memory", memory_table(rows, points), _memory_note(rows, points)),
        *_table_section(
            "Speed",
            speed_table(rows, points),
            "Medians of one denoising step; a ratio below 1 is faster than the dense model.",
        ),
        *_compare_sections(folder),
        Section("Provenance", table=provenance_table(rows, recipe)),
        *_table_section("Settings of the run", settings_table(recipe)),
    ]


def _answer_sections(
    rows: Sequence[Row],
    points: Sequence[Point],
    dense: Dense | None,
    bound: float,
    recipe: Mapping[str, Any],
) -> list[Section]:
    if not points:
        return []
    best = recommend(points, bound)
    table = decisive_table(rows)
    first = len(table) - len(points)
    marked = first + list(points).index(best.point) if best is not None else None
    note = (
        "Errors are medians over seeds, on held-out clips whose past is read from the cache. "
        "velocity_error is the squared difference from the dense model's velocity, relative to it; "
        "after recovery means at the last measured step of each line. A token costs its scalars "
        "and bytes in every layer."
    )
    notes = [note, *_shared_note(rows, points, table[0])]
    command = how_to_use(best.point, dense, recipe.get("recipe") or {}) if best is not None else ""
    return [
        Section(
            "Which setting to use",
            lead=answer_sentence(best, dense, bound),
            paragraphs=answer_reasons(best, dense),
            code=command,
        ),
        Section("Every setting", table=table, marked=marked, paragraphs=notes),
    ]


def _shared_note(rows: Sequence[Row], points: Sequence[Point], header: Sequence[str]) -> list[str]:
    """What seconds to convert leave out, where the table has such a column."""
    if SECONDS_TO_CONVERT not in header or not any(point.shares for point in points):
        return []
    stages = shared_seconds(rows)
    told = join_words([f"{stage} {format_seconds(amount)}" for stage, amount in stages.items()])
    return [
        "Seconds to convert with (+ shared) are of a setting's own decompositions: the sweep did "
        f"the rest once for all of them, which took {format_seconds(sum(stages.values()))} "
        f"({told}). Converted by itself, a setting takes both."
    ]


def _plot_section(name: str, rows: Sequence[Row]) -> Section:
    title, alt, note = PLOTS[name]
    notes = spectra_notes(rows) if name == "spectra" else [note] if note else []
    image, data = f"plots/{name}.png", f"plots/{name}.csv"
    return Section(title, image=image, alt=alt, data=data, paragraphs=notes)


def _table_section(title: str, table: list[list[str]], note: str = "") -> list[Section]:
    if not table:
        return []
    return [Section(title, table=table, paragraphs=[note] if note else [])]


def _memory_note(rows: Sequence[Row], points: Sequence[Point]) -> str:
    """How to read the table of memory, and whom it leaves out."""
    note = (
        "Bytes of the cache of all layers, decimal units: a whole clip kept, or the model's "
        "own window, at two bytes a number unless the line says otherwise."
    )
    missing = without_memory(rows, points)
    if len(missing) > _NAMED:
        missing = [*missing[:_NAMED], f"{len(missing) - _NAMED} more"]
    return f"{note} No row tells the memory of {join_words(missing)}." if missing else note


def _strip_sections(
    folder: Path, points: Sequence[Point], best: Recommendation | None
) -> list[Section]:
    """Strips of the recommended point first, then of the more accurate; the rest is named."""
    files = sorted((folder / "strips").glob("*.png"))
    if not files:
        return []
    by_error = sorted(points, key=lambda point: point.final_error)
    first = [best.point] if best is not None else []
    order = list(dict.fromkeys(point.key for point in [*first, *by_error]))
    names = setting_names(by_error)
    several = len({path.stem.rpartition("-")[2] for path in files}) > 1

    def key_of(path: Path) -> str:
        return path.stem.rpartition("-")[0]

    def place(path: Path) -> int:
        return order.index(key_of(path)) if key_of(path) in order else len(order)

    images: dict[str, str] = {}
    room = STRIPS_BYTES
    for path in sorted(files, key=place):
        room -= path.stat().st_size
        if len(images) == STRIPS_SHOWN or (images and room < 0):
            break
        name = names.get(key_of(path), key_of(path))
        name += f", seed {path.stem.rpartition('-')[2]}" if several else ""
        images[f"strips/{path.name}"] = (
            f"{name}: dense, converted and their difference, from start to end"
        )
    notes = [
        "From top to bottom: the dense rollout, the converted one, and their "
        "difference, grey where there is none. " + _shown_words(len(images), len(files))
    ]
    return [Section("Rollout strips", images=images, paragraphs=notes)]


def _shown_words(shown: int, there: int) -> str:
    if shown == there:
        return "The recommended setting comes first, then the more accurate."
    return f"Shown are {shown} of the {there} in strips/."


def _compare_sections(folder: Path) -> list[Section]:
    image = "compare.png" if (folder / "compare.png").is_file() else ""
    link = "compare.mp4" if (folder / "compare.mp4").is_file() else ""
    if not image and not link:
        return []
    alt = "Frames of the dense rollout beside frames of the converted rollout"
    title = "Dense beside converted"
    return [Section(title, image=image, alt=alt, link=link)]
