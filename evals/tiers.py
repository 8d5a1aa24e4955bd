"""Quality against bytes of one conversion: quantised caches, and newest frames kept dense.

    python -m evals.tiers --out rows.jsonl [--checkpoint demo]

Converts once for each size and kind of positions, then streams held-out clips through the cache at
every precision and with every number of dense frames. `velocity_error` is against the dense model;
`cache_bytes_per_token` counts scales, and spreads the dense frames over the window.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import typer

from evals.ablation import DECOUPLED, RECONSTRUCTED, changed, measure, whole
from vmla_convert.__main__ import main as run_reporting_errors
from vmla_convert.config import ConvertConfig, EvaluateConfig, LayerConfig, RuntimeConfig
from vmla_convert.console import out
from vmla_convert.layers.dit import CausalWanModel
from vmla_convert.pipelines.evaluate import HeldOut, dense_rows
from vmla_convert.pipelines.factoring import convert_model
from vmla_convert.pipelines.load import load
from vmla_convert.pipelines.rows import cache_rows, error_rows
from vmla_convert.results import Row, append_rows

CUTS = (0.92, 0.96)
Bits = Literal["model", "int8", "int4"]
DTYPES: tuple[Bits, ...] = ("model", "int8", "int4")


class Tier(NamedTuple):
    """One way to keep the cache.

    Attributes:
        layer: Of the conversion.
        cut: Its size.
        dtype: Of the content latents.
        rope_dtype: Of the rope keys.
        recent: Newest frames that stay dense.
    """

    layer: LayerConfig
    cut: float
    dtype: Bits
    rope_dtype: Literal["model", "int8"]
    recent: int


def tiers(teacher: CausalWanModel) -> Iterator[Tier]:
    chunk = teacher.config.chunk_frames
    for layer in (RECONSTRUCTED, DECOUPLED):
        for cut in CUTS:
            for dtype in DTYPES:
                yield Tier(layer, cut, dtype, "model", 0)
        if layer == DECOUPLED:
            yield Tier(layer, CUTS[-1], "int4", "int8", 0)
        for recent in (chunk, 2 * chunk):
            for dtype in DTYPES[::2]:
                yield Tier(layer, CUTS[-1], dtype, "model", recent)


def main(
    rows_file: Annotated[Path, typer.Option("--out", help="JSONL to append rows to.")],
    checkpoint: Annotated[str, typer.Option(help="The dense checkpoint, or 'demo'.")] = "demo",
    clips: Annotated[int, typer.Option(min=2, help="Held-out clips.")] = 24,
) -> None:
    """Measure, append the rows and print them."""
    teacher = load(checkpoint)
    held_out = HeldOut(teacher, EvaluateConfig(clips), streamed=True)
    rows, students = (
        dense_rows(teacher, held_out),
        dict[tuple[LayerConfig, float], CausalWanModel](),
    )
    with out.progress() as progress:
        measured = measure(teacher)
        for tier in progress.track(list(tiers(teacher)), "streaming"):
            layer, cut = tier.layer, tier.cut
            if (layer, cut) not in students:
                evidence = changed(teacher, measured, layer, whole)
                config = ConvertConfig(cut=cut, layer=layer)
                students[layer, cut] = convert_model(teacher, config, evidence)
            rows += measured_rows(students[layer, cut], tier, held_out)
    append_rows(rows_file, rows)
    show(rows)


def measured_rows(student: CausalWanModel, tier: Tier, held_out: HeldOut) -> list[Row]:
    config = student.config
    policy = replace(config.cache, dense_recent_frames=tier.recent)
    student.config = replace(config, cache=policy)
    runtime = RuntimeConfig(cache_dtype=tier.dtype, rope_dtype=tier.rope_dtype)
    errors = held_out.measure(student, runtime)
    rows = error_rows(errors, student.config, 0, runtime=runtime)
    return [*rows, *cache_rows(student.config, runtime=runtime)]


def show(rows: list[Row]) -> None:
    dense = {row.metric: row.value for row in rows if row.run == "dense"}
    cells: list[list[object]] = []
    converted = [row for row in rows if row.run != "dense"]
    for key in dict.fromkeys(_keeping(r) for r in converted):
        values = {r.metric: r.value for r in converted if _keeping(r) == key}
        nbytes = values["cache_bytes_per_token"]
        cells.append(
            [
                *key,
                f"{nbytes:.4g}",
                f"{dense['cache_bytes_per_token'] / nbytes:.1f}x",
                f"{values['velocity_error']:.3g}",
                f"{values['flow_loss'] / dense['flow_loss'] - 1:+.1%}",
            ]
        )
    header = [
        "run",
        "cache",
        "rope keys",
        "dense frames",
        "bytes a token",
        "smaller",
        "velocity_error",
    ]
    out.table("Tiers", [*header, "flow loss above dense"], cells)


def _keeping(row: Row) -> tuple[object, ...]:
    return row.run, row.cache_dtype, row.rope_dtype or "", row.dense_recent_frames


if __name__ == "__main__":
    sys.exit(run_reporting_errors(lambda: typer.run(main)))
