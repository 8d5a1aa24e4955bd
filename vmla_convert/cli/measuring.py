"""What a conversion costs in quality: measured, and reported."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from vmla_convert.cli.options import (
    BaseModel,
    BytesPerToken,
    CacheDtype,
    Checkpoint,
    Cut,
    Data,
    Deployment,
    Json,
    Rank,
    Teacher,
    TeacherFile,
    asked_size,
)
from vmla_convert.config import (
    DataConfig,
    EvaluateConfig,
    ReportConfig,
    RuntimeConfig,
    SourceConfig,
)
from vmla_convert.console import out
from vmla_convert.errors import CheckpointError
from vmla_convert.tables import from_dict


def evaluate(
    checkpoint: Checkpoint,
    teacher: Teacher = None,
    file: TeacherFile = None,
    clips: Annotated[int, typer.Option(min=2, help="Held-out clips.")] = EvaluateConfig.clips,
    data: Data = DataConfig.source,
    bytes_per_token: BytesPerToken = None,
    cut: Cut = None,
    rank: Rank = None,
    cache_dtype: CacheDtype = RuntimeConfig.cache_dtype,
    base_model: BaseModel = None,
    settings: Deployment = None,
    json: Json = False,
) -> None:
    """Measure a converted checkpoint against its dense source on held-out clips.

    Clips are streamed through caches where a size, a dtype or a window is given. A codec is
    measured against its base model. Example:

        vmla eval runs/kv --bytes-per-token 16
    """
    from vmla_convert.layers.runtime import check_runtime
    from vmla_convert.loading.load import compute_device, load, teacher_of
    from vmla_convert.measuring.evaluate import HeldOut, dense_rows, measuring_bar
    from vmla_convert.measuring.rows import cache_rows, error_rows
    from vmla_convert.recovery.checks import check_pair

    out.json = json
    device = compute_device()
    # The teacher itself may be measured too, and is then that file of the same repository.
    given = SourceConfig(checkpoint, file if checkpoint == teacher else None, base_model=base_model)
    source = teacher_of(given, teacher, file)
    dense = load(source, device)
    model = load(replace(given, overrides=tuple(settings or ())), device)
    check_pair(model.config, dense.config)
    if model.config.is_dense:
        _check_is_teacher(given, source)
    size = asked_size(bytes_per_token, cut, rank)
    runtime = replace(from_dict(RuntimeConfig, {"cache_dtype": cache_dtype}), size=size)
    check_runtime(model.config, runtime)
    cached = runtime != RuntimeConfig()
    dense.config = replace(dense.config, cache=model.config.cache)
    config = EvaluateConfig(clips, DataConfig(data, seed=1))
    measured = cached or not model.config.is_dense
    # The dense model, itself with another past; then the other one.
    passes = 3 if measured else 2
    with out.progress() as progress, closing(measuring_bar(progress, config, passes)) as bar:
        held_out = HeldOut(dense, config, cached or bool(settings), bar)
        rows = dense_rows(dense, held_out)
        if measured:
            errors = held_out.measure(model, runtime if cached else None)
            rows += error_rows(errors, model.config, None, runtime=runtime)
            rows += cache_rows(model.config, runtime=runtime)
    cells = [[row.run, row.metric, row.value, row.unit] for row in rows]
    out.table("Held-out measurement", ["run", "metric", "value", "unit"], cells)


def report(
    folder: Annotated[Path, typer.Argument(help="Folder with rows.jsonl.", metavar="DIR")],
    title: Annotated[str, typer.Option(help="Heading of the report.")] = ReportConfig.title,
    loss_bound: Annotated[
        float,
        typer.Option(
            min=0,
            help="Flow loss that the recommended size may have above the dense model's, as a "
            "share of it.",
        ),
    ] = ReportConfig.loss_bound,
    json: Json = False,
) -> None:
    """Write report.md, report.html and plots from the rows in a folder: which size to use."""
    from vmla_convert.report.report import write_report

    out.json = json
    for path in write_report(folder, title, loss_bound):
        out.path("wrote", path)


def _check_is_teacher(checkpoint: SourceConfig, teacher: SourceConfig) -> None:
    """Refuse a second dense model: errors against the teacher are told of converted ones only."""
    from vmla_convert.checkpoint.source import fingerprint
    from vmla_convert.loading.load import locate

    # By content, as one checkpoint may be given as a file and as its folder.
    one, other = (fingerprint(locate(source)[0]) for source in (checkpoint, teacher))
    if one != other:
        raise CheckpointError(
            f"{checkpoint.checkpoint} is dense, but not the teacher {teacher.checkpoint}",
            "give a converted CKPT; a dense CKPT must be the teacher itself",
        )
