"""The generate command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vmla_convert.cli.options import (
    OTHER,
    OUTPUT,
    BaseModel,
    BytesPerToken,
    CacheDtype,
    Checkpoint,
    Cut,
    File,
    Json,
    Loras,
    Model,
)
from vmla_convert.config import GenerateConfig, command_recipe
from vmla_convert.console import out
from vmla_convert.errors import ConfigError

CLIP = "Clip"


def generate(
    checkpoint: Checkpoint,
    prompts: Annotated[
        list[str],
        typer.Option(
            "--prompt",
            metavar="TEXT",
            help="May be repeated for several clips.",
            rich_help_panel=CLIP,
        ),
    ],
    video: Annotated[
        Path,
        typer.Option(
            "--out", "-o", metavar="FILE", help="An .mp4 to write.", rich_help_panel=OUTPUT
        ),
    ],
    seconds: Annotated[
        float | None,
        typer.Option("--seconds", metavar="N", help="Length of the clip.", rich_help_panel=CLIP),
    ] = None,
    frames: Annotated[
        int | None,
        typer.Option(
            "--frames",
            metavar="N",
            min=1,
            help="Length in latent frames; Wan makes 4 a second. Default: 20.",
            rich_help_panel=CLIP,
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option("--seed", metavar="N", help="Seed of all noise.", rich_help_panel=CLIP),
    ] = None,
    prompt_at: Annotated[
        list[str] | None,
        typer.Option(
            "--prompt-at",
            metavar="TIME:TEXT",
            help="Another prompt for all clips from a time on: '20s:a dog', or '80:a dog' in "
            "latent frames. May be repeated.",
            rich_help_panel=CLIP,
        ),
    ] = None,
    image: Annotated[
        Path | None,
        typer.Option(
            "--image",
            metavar="FILE",
            help="An image or a video that the clip continues.",
            rich_help_panel=CLIP,
        ),
    ] = None,
    compare: Annotated[
        str | None,
        typer.Option(
            "--compare",
            metavar="CKPT",
            help="A second checkpoint, shown beside the first from the same noise.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    json: Json = False,
    bytes_per_token: BytesPerToken = None,
    cut: Cut = None,
    cache_dtype: CacheDtype = None,
    file: File = None,
    model: Model = None,
    loras: Loras = None,
    base_model: BaseModel = None,
    changes: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Keys of source, model, runtime, media and generate: --set runtime.offload=true",
            rich_help_panel=OTHER,
        ),
    ] = None,
) -> None:
    """Generate video from prompts; the first frame lands beside the video as a PNG.

    With --compare, a contact sheet of both models lands there instead.
    """
    from vmla_convert.generating.write_video import write_video
    from vmla_convert.loading.teacher import sources_to_compare

    out.json = json
    if seconds is not None and frames is not None:
        raise ConfigError("--seconds and --frames both give the length", "give one of them")
    options = {
        "generate.prompts": prompts,
        "generate.frames": frames,
        "generate.seed": seed,
        "runtime.size.bytes_per_token": bytes_per_token,
        "runtime.size.cut": cut,
        "runtime.cache_dtype": cache_dtype,
        "source.checkpoint": checkpoint,
        "source.file": file,
        "source.model": model,
        "source.loras": loras,
        "source.base_model": base_model,
    }
    tables = ("source", "model", "runtime", "media", "generate")
    recipe = command_recipe(tables, options, changes)
    sources = sources_to_compare(recipe.dense, compare) if compare else [recipe.dense]
    with out.progress() as progress:
        written = write_video(
            video,
            sources,
            recipe.generate or GenerateConfig(),
            recipe.runtime,
            recipe.media,
            seconds=seconds,
            prompt_at=prompt_at or (),
            image=image,
            progress=progress,
        )
    out.data({f"cache of {name} (bytes)": size for name, size in written.cache_bytes.items()})
    for path in written.paths:
        out.path("wrote", path)
