"""Commands that measure what a conversion costs in quality, and list the clips for it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vmla_convert.cli.cost import Yes, agree
from vmla_convert.cli.options import (
    CLIPS,
    OTHER,
    RUNNING,
    BytesPerToken,
    CacheDtype,
    Checkpoint,
    ClipsDir,
    Cut,
    Data,
    File,
    Json,
    Model,
    NoVerify,
    Prompts,
    Teacher,
    TeacherFile,
    named_teacher,
    read_prompt_file,
)
from vmla_convert.config import (
    ConvertConfig,
    RecoverConfig,
    ReportConfig,
    SourceConfig,
    command_recipe,
)
from vmla_convert.console import out
from vmla_convert.results import Row

CHEAPER = "fewer or shorter clips (--clips 4, --set evaluate.data.frames=9)"


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
    prompts: Prompts = None,
    clips_dir: ClipsDir = None,
    rollout: Annotated[
        int | None,
        typer.Option(
            "--rollout",
            metavar="FRAMES",
            min=1,
            help="Also generate videos of so many latent frames with both models from the same "
            "noise, and compare them.",
            rich_help_panel=CLIPS,
        ),
    ] = None,
    bytes_per_token: BytesPerToken = None,
    cut: Cut = None,
    cache_dtype: CacheDtype = None,
    yes: Yes = False,
    no_verify: NoVerify = False,
    json: Json = False,
    changes: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Keys of source (the dense checkpoint), model, runtime, evaluate and media: "
            "--set model.cache.window_frames=12",
            rich_help_panel=OTHER,
        ),
    ] = None,
) -> None:
    """Measure a conversion against its dense checkpoint on held-out clips.

    Clips are streamed through caches where a size, a dtype or a window is given.
    --rollout 81 says for how many frames both models make the same video, and how
    their videos differ after that: sharpness, motion, flicker, drift of colour.
    """
    from vmla_convert.measuring.against_dense import measure_against_dense, plan_against_dense

    out.json = json
    options = {
        "source.checkpoint": teacher,
        "source.file": file,
        "evaluate.clips": clips,
        "evaluate.data.source": data,
        "evaluate.data.prompts": read_prompt_file(prompts),
        "evaluate.rollout_frames": rollout,
        "media.clips_dir": clips_dir,
        "runtime.size.bytes_per_token": bytes_per_token,
        "runtime.size.cut": cut,
        "runtime.cache_dtype": cache_dtype,
    }
    tables = ("source", "model", "runtime", "evaluate", "media")
    recipe = command_recipe(tables, options, changes)
    dense = named_teacher(recipe, teacher)
    given = SourceConfig(checkpoint, overrides=recipe.model, verify=not no_verify)
    settings = recipe.evaluate, recipe.runtime
    agree(plan_against_dense(given, dense, *settings, recipe.media), yes, CHEAPER)
    with out.progress() as progress:
        rows = measure_against_dense(given, dense, *settings, progress, recipe.media)
    cells = [
        [row.run, row.metric, _place(row), row.value, _interval(row), row.unit] for row in rows
    ]
    header = ["run", "metric", "of", "value", "95 % interval", "unit"]
    out.table("Held-out measurement", header, cells)


def _place(row: Row) -> str:
    """Which part of a video or of the model a row is about; empty for the whole."""
    parts = {
        "chunk": row.chunk,
        "segment": row.segment,
        "layer": row.layer,
        "timestep": None if row.timestep is None else f"{row.timestep:.0f}",
    }
    return " ".join(f"{name} {value}" for name, value in parts.items() if value is not None)


def _interval(row: Row) -> str:
    return "" if row.low is None else f"{row.low:.4g} to {row.high:.4g}"


def claims(
    checkpoint: Checkpoint,
    file: File = None,
    model: Model = None,
    steps: Annotated[
        int | None,
        typer.Option(
            "--steps",
            metavar="N",
            min=0,
            help="Steps of distillation for each init, after the layer-wise steps. Default: 100.",
            rich_help_panel=RUNNING,
        ),
    ] = None,
    data: Data = None,
    prompts: Prompts = None,
    clips_dir: ClipsDir = None,
    yes: Yes = False,
    json: Json = False,
    changes: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Keys of source, model, convert, recover, evaluate and media: --set "
            "recover.layerwise_steps=10",
            rich_help_panel=OTHER,
        ),
    ] = None,
) -> None:
    """Measure the claims of the VideoMLA paper on a dense checkpoint.

    The paper's layer is built with the paper's init and with random weights, and
    both are recovered. A codec in the same bytes stands beside them, not trained.
    """
    from vmla_convert.sweep.claims import measure_claims, plan_claims

    out.json = json
    options = {
        "source.checkpoint": checkpoint,
        "source.file": file,
        "source.model": model,
        "recover.training.steps": steps,
        **{f"{table}.data.source": data for table in ("convert", "recover", "evaluate")},
        **{
            f"{table}.data.prompts": read_prompt_file(prompts)
            for table in ("convert", "recover", "evaluate")
        },
        "media.clips_dir": clips_dir,
    }
    tables = ("source", "model", "convert", "recover", "evaluate", "media")
    recipe = command_recipe(tables, options, changes)
    settings = (
        recipe.dense,
        recipe.convert or ConvertConfig(),
        recipe.recover or RecoverConfig(),
        recipe.evaluate,
        recipe.media,
    )
    agree(plan_claims(*settings), yes, "fewer steps (--steps 20)")
    with out.progress() as progress:
        found = measure_claims(*settings, progress)
    if json:
        out.data(found)
        return
    header = ["claim", "measured here", "value", "bound", "holds", "beside it", "its value"]
    cells = [
        [c.claim, c.measured, c.value, c.bound, "yes" if c.holds else "no", c.ours, c.our_value]
        for c in found
    ]
    out.table("Claims of arXiv 2605.30351", header, cells)


def clips(clips_dir: ClipsDir = None, json: Json = False) -> None:
    """List the clips that were sampled from models or encoded from videos.

    To remove a set of clips, delete the set's folder.
    """
    from vmla_convert.config import MediaConfig
    from vmla_convert.generating.clip_sets import clip_sets, clips_folder

    out.json = json
    root = clips_folder(MediaConfig(clips_dir=clips_dir))
    header = ["clips", "kind", "for", "model", "frames", "latent size", "bytes", "folder"]
    rows = [
        [
            each.clips,
            each.kind,
            each.split or "both",
            each.model or "-",
            each.frames,
            "x".join(map(str, each.latent_size)),
            each.nbytes,
            each.folder,
        ]
        for each in clip_sets(root)
    ]
    out.table(f"Clips in {root}", header, rows)


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
