"""Commands around VBench, which runs in an environment of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vmla_convert.cli.cost import Yes, agree
from vmla_convert.cli.options import (
    OTHER,
    OUTPUT,
    RUNNING,
    BytesPerToken,
    CacheDtype,
    Checkpoint,
    Cut,
    File,
    Json,
    Loras,
    Model,
    option,
)
from vmla_convert.config import command_recipe
from vmla_convert.console import out
from vmla_convert.results import ROWS_NAME, put_rows

VIDEOS = "Videos"

vbench_app = typer.Typer(no_args_is_help=True, rich_markup_mode="rich")

Dimensions = Annotated[
    list[str] | None,
    option("--dimension", "NAME", "Dimension to measure; repeatable. Default: all.", VIDEOS),
]
Samples = Annotated[
    int,
    option(
        "--samples",
        "N",
        "Videos of each prompt. VBench asks for 5, and for 25 for temporal_flickering.",
        VIDEOS,
        min=1,
    ),
]
Frames = Annotated[int, option("--frames", "N", "Latent frames of a video.", VIDEOS, min=1)]
Long = Annotated[
    bool, option("--long", None, "Name the command of VBench-Long, for long videos.", VIDEOS)
]


@vbench_app.callback()
def vbench() -> None:
    """Make videos for VBench's prompts, and take its results over as rows."""


@vbench_app.command(
    "generate",
    epilog="Example: [bold]vmla vbench generate kv VBench_full_info.json -o videos "
    "--dimension subject_consistency[/bold]",
)
def generate(
    checkpoint: Checkpoint,
    info: Annotated[
        Path, typer.Argument(help="VBench_full_info.json of your copy of VBench.", metavar="INFO")
    ],
    folder: Annotated[Path, option("--out -o", "DIR", "Folder for the videos.", OUTPUT)],
    dimensions: Dimensions = None,
    samples: Samples = 5,
    frames: Frames = 21,
    long: Long = False,
    file: File = None,
    model: Model = None,
    loras: Loras = None,
    bytes_per_token: BytesPerToken = None,
    cut: Cut = None,
    cache_dtype: CacheDtype = None,
    dry_run: Annotated[
        bool, option("--dry-run", None, "Count the missing videos, and stop.", OUTPUT)
    ] = False,
    yes: Yes = False,
    json: Json = False,
    changes: Annotated[
        list[str] | None,
        option("--set", "KEY=VALUE", "Keys of source, model, runtime and media.", OTHER),
    ] = None,
) -> None:
    """Write the videos of VBench's prompts that a folder lacks, and print the command to measure.

    Each prompt has the seeds 0, 1, 2, …, so a dense model and its conversion start
    from the same noise. The same command goes on after an interruption.
    """
    from vmla_convert.measuring.vbench import (
        VideoSuite,
        evaluation_command,
        plan_videos,
        write_videos,
    )

    out.json = json
    options = {
        "source.checkpoint": checkpoint,
        "source.file": file,
        "source.model": model,
        "source.loras": loras,
        "runtime.size.bytes_per_token": bytes_per_token,
        "runtime.size.cut": cut,
        "runtime.cache_dtype": cache_dtype,
    }
    recipe = command_recipe(("source", "model", "runtime", "media"), options, changes)
    suite = VideoSuite(info, tuple(dimensions or ()), samples, frames)
    missing, work = plan_videos(recipe.dense, suite, folder, recipe.runtime)
    out.say(f"videos to make: {missing}, in {folder}")
    if not dry_run:
        agree(work, yes, "one dimension, fewer samples or fewer frames")
        with out.progress() as progress:
            write_videos(recipe.dense, suite, folder, recipe.runtime, recipe.media, progress)
    out.data(
        {
            "folder": str(folder),
            "missing": missing if dry_run else 0,
            "command": evaluation_command(suite, folder, long),
        }
    )


@vbench_app.command(
    "import",
    epilog="Example: [bold]vmla vbench import results_eval_results.json -o runs/kv "
    "--run codec[/bold]",
)
def import_results(
    results: Annotated[Path, typer.Argument(help="*_eval_results.json.", metavar="RESULTS")],
    folder: Annotated[
        Path, option("--out -o", "DIR", f"Folder whose {ROWS_NAME} gets the rows.", OUTPUT)
    ],
    run: Annotated[
        str, option("--run", "NAME", "Name of the model in the rows, such as dense.", RUNNING)
    ],
    bytes_per_token: BytesPerToken = None,
    json: Json = False,
) -> None:
    """Add the scores that VBench wrote to the rows of a folder."""
    from vmla_convert.measuring.vbench import result_rows

    out.json = json
    rows = result_rows(results, {"run": run, "bytes_per_token": bytes_per_token})
    folder.mkdir(parents=True, exist_ok=True)
    put_rows(folder / ROWS_NAME, rows)
    header = ["dimension", "score", "low", "high"]
    out.table(run, header, [[r.note, r.value, r.low or "", r.high or ""] for r in rows])
