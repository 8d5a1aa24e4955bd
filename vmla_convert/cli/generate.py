"""The generate command."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from vmla_convert.cli.fit import FitIn, fitted, given_keys
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
    NoVerify,
    option,
)
from vmla_convert.config import GenerateConfig, Recipe, command_recipe
from vmla_convert.console import out
from vmla_convert.errors import ConfigError

CLIP = "Clip"
TABLES = ("source", "model", "runtime", "media", "generate")


Prompts = Annotated[
    list[str] | None, option("--prompt", "TEXT", "May be repeated for several clips.", CLIP)
]
Video = Annotated[Path, option("--out -o", "FILE", "An .mp4 to write.", OUTPUT)]
Seconds = Annotated[float | None, option("--seconds", "N", "Length of the clip.", CLIP)]
Frames = Annotated[
    int | None,
    option(
        "--frames", "N", "Length in latent frames; Wan makes 4 a second. Default: 20.", CLIP, min=1
    ),
]
Seed = Annotated[int | None, option("--seed", "N", "Seed of all noise.", CLIP)]
PromptAt = Annotated[
    list[str] | None,
    option(
        "--prompt-at",
        "TIME:TEXT",
        "Another prompt for all clips from a time on: '20s:a dog', or '80:a dog' in "
        "latent frames. May be repeated.",
        CLIP,
    ),
]
Image = Annotated[
    Path | None, option("--image", "FILE", "An image or a video that the clip continues.", CLIP)
]
Compare = Annotated[
    str | None,
    option(
        "--compare",
        "CKPT",
        "A second checkpoint, shown beside the first from the same noise.",
        OUTPUT,
    ),
]
SaveStream = Annotated[
    Path | None,
    option("--save-stream", "FILE", "Keep the state at the end, to continue from.", OUTPUT),
]
ResumeStream = Annotated[
    Path | None,
    option(
        "--resume-stream",
        "FILE",
        "Continue a saved state. --seconds or --frames give the length of the whole video; only "
        "the new part is written.",
        CLIP,
    ),
]
Changes = Annotated[
    list[str] | None,
    option(
        "--set",
        "KEY=VALUE",
        "Keys of source, model, runtime, media and generate: --set runtime.offload=true",
        OTHER,
    ),
]


def generate(
    checkpoint: Checkpoint,
    video: Video,
    prompts: Prompts = None,
    seconds: Seconds = None,
    frames: Frames = None,
    seed: Seed = None,
    prompt_at: PromptAt = None,
    image: Image = None,
    compare: Compare = None,
    save_stream: SaveStream = None,
    resume_stream: ResumeStream = None,
    fit: FitIn = None,
    json: Json = False,
    bytes_per_token: BytesPerToken = None,
    cut: Cut = None,
    cache_dtype: CacheDtype = None,
    file: File = None,
    model: Model = None,
    loras: Loras = None,
    base_model: BaseModel = None,
    no_verify: NoVerify = False,
    changes: Changes = None,
) -> None:
    """Generate video from prompts; the first frame lands beside the video as a PNG.

    With --compare, a contact sheet of both models lands there instead.
    """
    from vmla_convert.generating.write_video import write_video
    from vmla_convert.loading.load import open_named
    from vmla_convert.loading.teacher import sources_to_compare

    out.json = json
    if seconds is not None and frames is not None:
        raise ConfigError("--seconds and --frames both give the length", "give one of them")
    if bool(prompts) == bool(resume_stream):
        raise ConfigError(
            "a video begins with --prompt, or continues with --resume-stream", "give one of them"
        )
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
        "source.verify": False if no_verify else None,
    }

    def read(more: Sequence[str]) -> Recipe:
        return command_recipe(TABLES, options, [*(changes or ()), *more])

    recipe = read(())
    with out.progress() as progress:
        config = open_named(recipe.dense, progress).config
    given = {key for key, value in options.items() if value is not None} | given_keys(changes)
    stage = "generate dense" if config.is_dense else "generate"
    recipe = fitted(config, read, stage, fit, video.parent, given)
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
            save_stream=save_stream,
            resume_stream=resume_stream,
            progress=progress,
        )
    out.data({f"cache of {name} (bytes)": size for name, size in written.cache_bytes.items()})
    for path in written.paths:
        out.path("wrote", path)
