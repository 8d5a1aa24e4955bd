"""The report's sections in the order in which a reader asks."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from vmla_convert.report.answer import Recommendation, answer_reasons, answer_sentence
from vmla_convert.report.charts import spectra_notes
from vmla_convert.report.pages import Block, Code, Picture, Section, Table, Text
from vmla_convert.report.recipe import RECIPE_FILE, commands, to_toml
from vmla_convert.report.settings import Setting, read_dense, read_settings
from vmla_convert.report.tables import (
    decisive_table,
    equal_errors,
    failed_table,
    memory_table,
    provenance_table,
    speed_table,
    streams_table,
)
from vmla_convert.results import Row

STRIPS_SHOWN = 3

# What each picture shows.
PLOTS = {
    "quality": "velocity_error of every cache against its bytes per token and layer",
    "recovery": "velocity_error against the step of recovery, for each cache size",
    "rollout": "quality and drift of each segment of a rollout, dense and converted",
    "spectra": "energy by rank, and 99 %-energy rank by layer, of weights, on activations, of MLA",
}
MEASURES = (
    "velocity_error is the squared distance from the dense model's velocity, relative to its "
    "square, on held-out clips whose past comes from the cache; errors are medians over seeds. "
    "An unquantised number counts two bytes."
)


def report_sections(
    folder: Path,
    rows: Sequence[Row],
    best: Recommendation | None,
    answer: Sequence[Block],
    drawn: Collection[str],
    record: Mapping[str, Any],
) -> list[Section]:
    """All sections that have rows or files.

    Args:
        folder: Folder of plots, strips and the comparison.
        rows: All rows of the report.
        best: The recommendation.
        answer: Blocks of the first section, from `answer_blocks`.
        drawn: Names of the saved charts.
        record: `recipe.json` of the run; empty without one.
    """
    settings = read_settings(rows)
    plots = {name: [_plot(name)] if name in drawn else list[Block]() for name in PLOTS}
    speed, memory = speed_table(rows, settings), memory_table(rows, settings)
    sections = [
        Section("Which size to use", answer),
        Section("Quality against bytes", _quality(rows, settings, best, plots["quality"])),
        Section("Recovery", plots["recovery"]),
        Section(
            "Memory of the cache",
            [
                *_noted(memory, "Memory", "One clip, all layers."),
                *_noted(
                    streams_table(rows, settings),
                    "Streams per GPU",
                    "Clips with a full window that one GPU generates together, by formula.",
                ),
            ],
        ),
        Section(
            "Speed",
            _noted(speed, "Speed", "Medians of one denoising step, timed in turns with dense."),
        ),
        Section("Rollouts", [*plots["rollout"], *_pictures(folder, settings, best)]),
        Section("Spectra", [*plots["spectra"], *map(Text, spectra_notes(rows))]),
        Section("Failures", _noted(failed_table(rows), "Failures")),
        Section("Provenance", _provenance(rows, record)),
    ]
    return [section for section in sections if section.blocks]


def answer_blocks(
    rows: Sequence[Row],
    best: Recommendation | None,
    bound: float,
    record: Mapping[str, Any],
    toml: str,
) -> list[Block]:
    """The recommendation, the recipe `toml`, the commands, and the reasons."""
    if not read_settings(rows):
        return []
    blocks: list[Block] = [Text(answer_sentence(best, bound), lead=True)]
    if toml:
        text = f"{RECIPE_FILE}, beside this report, makes this cache:"
        blocks += [Text(text), Code(toml, "toml")]
    if best is not None:
        blocks.append(Code(commands(best.setting, record.get("recipe") or {}, bool(toml))))
    failed = len(failed_table(rows)[1:])
    return blocks + [Text(reason) for reason in answer_reasons(best, read_dense(rows), failed)]


def _quality(
    rows: Sequence[Row],
    settings: Sequence[Setting],
    best: Recommendation | None,
    plot: Sequence[Block],
) -> list[Block]:
    if not settings:
        return []
    lines = decisive_table(rows)
    first = len(lines) - len(settings)
    marked = first + list(settings).index(best.setting) if best is not None else None
    equal = [Text(sentence) for sentence in equal_errors(rows, settings)]
    return [*plot, *equal, Table(lines, "Quality of every cache", marked), Text(MEASURES)]


def _noted(lines: Sequence[Sequence[str]], label: str, note: str = "") -> list[Block]:
    notes = [Text(note)] if note else []
    return [Table(lines, label), *notes] if lines else []


def _plot(name: str) -> Picture:
    return Picture(f"plots/{name}.png", PLOTS[name], f"plots/{name}.csv")


def _pictures(
    folder: Path, settings: Sequence[Setting], best: Recommendation | None
) -> list[Block]:
    """Strips, the recommended point's first and then by error; after them the comparison."""
    first = [best.setting] if best is not None else []
    order = [*first, *sorted(settings, key=lambda setting: setting.error)]
    labels = {setting.key.point: setting.label for setting in reversed(order)}
    points = list(dict.fromkeys(setting.key.point for setting in order))

    def key(path: Path) -> str:
        return path.stem.rpartition("-")[0]

    def place(path: Path) -> int:
        return points.index(key(path)) if key(path) in labels else len(points)

    blocks: list[Block] = []
    for path in sorted(sorted((folder / "strips").glob("*.png")), key=place)[:STRIPS_SHOWN]:
        name = labels.get(key(path), path.stem)
        alt = f"{name}: dense rollout, converted rollout and their difference, from start to end"
        blocks.append(Picture(f"strips/{path.name}", alt))
    if (folder / "compare.png").is_file():
        alt = "frames of the dense rollout beside the converted"
        blocks.append(Picture("compare.png", alt, "compare.mp4"))
    return blocks


def _provenance(rows: Sequence[Row], record: Mapping[str, Any]) -> list[Block]:
    facts: list[Block] = [Table(provenance_table(rows, record), "Provenance")]
    recipe = to_toml(record.get("recipe") or {})
    return [*facts, Text("The recipe of the run:"), Code(recipe, "toml")] if recipe else facts
