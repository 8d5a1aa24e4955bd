"""The generate command."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from vmla_convert.cli.fit import FitIn, fitted, given_keys
from vmla_convert.cli.options import (
    OTHER,
    OUTPUT,
    RUNNING,
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
from vmla_convert.config import GenerateConfig, Recipe, SourceConfig, command_recipe
from vmla_convert.console import out
from vmla_convert.errors import ConfigError

if TYPE_CHECKING:
    from vmla_convert.generating.launch import Group
    from vmla_convert.generating.write_video import Written

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
    option("--save-stream", "FILE", "Keep the state at the end.", OUTPUT),
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
AttentionBackend = Annotated[
    str | None,
    option(
        "--attention-backend",
        "NAME",
        "Attention kernel: sdpa, cudnn, flash, flash3, flash4 or sage (8 bits). Default: auto, "
        "the best.",
        RUNNING,
    ),
]
Processes = Annotated[
    int | None,
    option(
        "--processes",
        "N",
        "Processes that compute one video together, one to a GPU. Not under torchrun.",
        RUNNING,
        min=1,
    ),
]
DryRun = Annotated[bool, option("--dry-run", None, "Check, show the plan, and stop.", OUTPUT)]
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
    processes: Processes = None,
    attention_backend: AttentionBackend = None,
    dry_run: DryRun = False,
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
    from vmla_convert.generating.film import check_video_path
    from vmla_convert.generating.launch import check_gpus, run_together
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
        "runtime.attention_backend": attention_backend,
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
    # The plan of --dry-run says how much memory one of several processes needs.
    if (processes or 1) == 1 and not dry_run and "WORLD_SIZE" not in os.environ:
        check_video_path(video)
        first = sources_to_compare(recipe.dense, compare)[0] if compare else recipe.dense
        with out.progress() as progress:
            config = open_named(first, progress).config
        given = {key for key, value in options.items() if value is not None} | given_keys(changes)
        stage = "generate dense" if config.is_dense else "generate"
        recipe = fitted(config, read, stage, fit, video.parent, given)
    elif fit is not None:
        raise ConfigError("--fit is for one process", "leave out --processes and --dry-run")
    sources = sources_to_compare(recipe.dense, compare) if compare else [recipe.dense]
    if dry_run:
        check_gpus(processes or 1)
        _show_plan(sources, recipe, processes or 1)
        return
    settings = {
        "seconds": seconds,
        "prompt_at": prompt_at or (),
        "image": image,
        "save_stream": save_stream,
        "resume_stream": resume_stream,
    }
    written = run_together(processes, partial(_write, video, sources, recipe, settings))
    if not written.paths:
        return  # process 0 of a launcher prints
    out.data({f"cache of {name} (bytes)": size for name, size in written.cache_bytes.items()})
    for path in written.paths:
        out.path("wrote", path)


def _write(
    video: Path,
    sources: list[SourceConfig],
    recipe: Recipe,
    settings: dict[str, Any],
    group: Group,
) -> Written:
    """Write the video as one of a group of processes."""
    from vmla_convert.generating.write_video import write_video
    from vmla_convert.progress import Silent

    common = recipe.generate or GenerateConfig(), recipe.runtime, recipe.media
    if not group.leads:
        return write_video(video, sources, *common, **settings, progress=Silent(), group=group)
    with out.progress() as progress:
        return write_video(video, sources, *common, **settings, progress=progress, group=group)


def _show_plan(sources: list[SourceConfig], recipe: Recipe, processes: int) -> None:
    """Show how each model's stream is divided."""
    from vmla_convert.generating.shares import plan_shares
    from vmla_convert.generating.write_video import compute_dtype, open_models

    for name, (opened, runtime) in open_models(sources, recipe.runtime).items():
        dtype = compute_dtype(runtime)
        shares = plan_shares(opened.config, runtime, dtype.itemsize, processes)
        out.data({"model": name} | shares._asdict())
