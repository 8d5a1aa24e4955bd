"""Commands that measure what a conversion costs in quality: eval, report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vmla_convert.cli.options import (
    CLIPS,
    OTHER,
    BytesPerToken,
    CacheDtype,
    Checkpoint,
    Cut,
    Data,
    Json,
    NoVerify,
    Teacher,
    TeacherFile,
    named_teacher,
)
from vmla_convert.config import ReportConfig, SourceConfig, command_recipe
from vmla_convert.console import out


def evaluate(
    checkpoint: Checkpoint,
    teacher: Teacher = None,
    file: TeacherFile = None,
    clips: Annotated[
        int | None,
        typer.Option(
            "--clips",
            metavar="N",
            min=2,
            help="Number of held-out clips. Default: 24.",
            rich_help_panel=CLIPS,
        ),
    ] = None,
    data: Data = None,
    bytes_per_token: BytesPerToken = None,
    cut: Cut = None,
    cache_dtype: CacheDtype = None,
    no_verify: NoVerify = False,
    json: Json = False,
    changes: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Keys of source (the dense checkpoint), model, runtime and evaluate: "
            "--set model.cache.window_frames=12",
            rich_help_panel=OTHER,
        ),
    ] = None,
) -> None:
    """Measure a conversion against its dense checkpoint on held-out clips.

    Clips are streamed through caches where a size, a dtype or a window is given.
    """
    from vmla_convert.measuring.against_dense import measure_against_dense

    out.json = json
    options = {
        "source.checkpoint": teacher,
        "source.file": file,
        "evaluate.clips": clips,
        "evaluate.data.source": data,
        "runtime.size.bytes_per_token": bytes_per_token,
        "runtime.size.cut": cut,
        "runtime.cache_dtype": cache_dtype,
    }
    recipe = command_recipe(("source", "model", "runtime", "evaluate"), options, changes)
    dense = named_teacher(recipe, teacher)
    given = SourceConfig(checkpoint, overrides=recipe.model, verify=not no_verify)
    with out.progress() as progress:
        rows = measure_against_dense(given, dense, recipe.evaluate, recipe.runtime, progress)
    cells = [[row.run, row.metric, row.value, row.unit] for row in rows]
    out.table("Held-out measurement", ["run", "metric", "value", "unit"], cells)


def report(
    folder: Annotated[Path, typer.Argument(help="Folder with rows.jsonl.", metavar="DIR")],
    title: Annotated[
        str, typer.Option("--title", metavar="TEXT", help="Heading of the report.")
    ] = ReportConfig.title,
    loss_bound: Annotated[
        float,
        typer.Option(
            "--loss-bound",
            metavar="SHARE",
            min=0,
            help="Flow loss that the recommended size may have above the dense model's, as a "
            "share of the dense model's loss.",
        ),
    ] = ReportConfig.loss_bound,
    json: Json = False,
) -> None:
    """Write a report with plots from the rows in a folder: which size to use."""
    from vmla_convert.report.report import write_report

    out.json = json
    for path in write_report(folder, title, loss_bound):
        out.path("wrote", path)
