"""What a conversion costs in quality: measured, and reported."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from vmla_convert.cli.options import (
    Checkpoint,
    Data,
    Deployment,
    Json,
    Teacher,
    TeacherFile,
)
from vmla_convert.config import (
    DataConfig,
    EvaluateConfig,
    ReportConfig,
    SourceConfig,
)
from vmla_convert.console import out
from vmla_convert.errors import CheckpointError


def evaluate(
    checkpoint: Checkpoint,
    teacher: Teacher,
    file: TeacherFile = None,
    clips: Annotated[int, typer.Option(min=2, help="Held-out clips.")] = EvaluateConfig.clips,
    data: Data = DataConfig.source,
    settings: Deployment = None,
    json: Json = False,
) -> None:
    """Measure a converted checkpoint against its dense source on held-out clips.

    With a window of its own, clips are streamed, through caches of that window.
    """
    from vmla_convert.pipelines.evaluate import HeldOut, dense_rows, measuring_bar
    from vmla_convert.pipelines.load import as_teacher, compute_device, load
    from vmla_convert.pipelines.recovery import check_pair
    from vmla_convert.pipelines.rows import cache_rows, error_rows

    out.json = json
    device = compute_device()
    # The teacher itself may be measured too, and is then that file of the same repository.
    given = SourceConfig(checkpoint, file if checkpoint == teacher else None)
    source = as_teacher(teacher, given, file)
    dense = load(source, device)
    model = load(replace(given, overrides=tuple(settings or ())), device)
    check_pair(model, dense)
    if model.config.mla is None:
        _check_is_teacher(given, source)
    dense.config = replace(dense.config, cache=model.config.cache)
    config = EvaluateConfig(clips, DataConfig(data, seed=1))
    # The dense model, itself with another past; then the converted one.
    passes = 2 if model.config.mla is None else 3
    with out.progress() as progress, closing(measuring_bar(progress, config, passes)) as bar:
        held_out = HeldOut(dense, config, bool(settings), bar)
        rows = dense_rows(dense, held_out)
        if model.config.mla is not None:
            rows += error_rows(held_out.measure(model), model.config, None)
            rows += cache_rows(model.config)
    cells = [[row.run, row.metric, row.value, row.unit] for row in rows]
    out.table("Held-out measurement", ["run", "metric", "value", "unit"], cells)


def report(
    folder: Annotated[Path, typer.Argument(help="Folder with rows.jsonl.", metavar="DIR")],
    title: Annotated[str, typer.Option(help="Heading of the report.")] = ReportConfig.title,
    loss_bound: Annotated[
        float,
        typer.Option(
            min=0,
            help="Flow loss that the recommended setting may have above the dense model's, as a "
            "share of it.",
        ),
    ] = ReportConfig.loss_bound,
    json: Json = False,
) -> None:
    """Write report.md, report.html and plots from the rows in a folder."""
    from vmla_convert.pipelines.report import write_report

    out.json = json
    for path in write_report(folder, title, loss_bound):
        out.path("wrote", path)


def _check_is_teacher(checkpoint: SourceConfig, teacher: SourceConfig) -> None:
    """Refuse a second dense model: errors against the teacher are told of converted ones only."""
    from vmla_convert.checkpoint.source import fingerprint
    from vmla_convert.pipelines.load import locate

    # By content, as one checkpoint may be given as a file and as its folder.
    one, other = (fingerprint(locate(source)[0]) for source in (checkpoint, teacher))
    if one != other:
        raise CheckpointError(
            f"{checkpoint.checkpoint} is dense, but not the teacher {teacher.checkpoint}",
            "give a converted CKPT; a dense CKPT must be the teacher itself",
        )
