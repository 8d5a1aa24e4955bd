"""Video from a checkpoint, or from two side by side."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vmla_convert.cli.options import (
    Base,
    BaseModel,
    BytesPerToken,
    CacheDtype,
    Checkpoint,
    Cut,
    Deployment,
    File,
    Json,
    Key,
    Loras,
    Model,
    Rank,
    asked_size,
)
from vmla_convert.config import MediaConfig, RuntimeConfig, SourceConfig
from vmla_convert.console import out
from vmla_convert.errors import ConfigError
from vmla_convert.tables import from_dict

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor


def generate(
    checkpoint: Checkpoint,
    prompt: Annotated[list[str], typer.Option(help="Repeat for several clips.")],
    video: Annotated[Path, typer.Option("--out", "-o", help="An .mp4 to write.")],
    seconds: Annotated[
        float | None,
        typer.Option(
            help="How long; Wan makes 4 latent frames a second, at 24 fps 6, and the demo 8."
        ),
    ] = None,
    frames: Annotated[
        int | None,
        typer.Option(min=1, help="The same in latent frames; 20 if neither is given."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of all noise.")] = 0,
    compare: Annotated[
        str | None,
        typer.Option(
            help="A second checkpoint, shown beside from the same noise; of the two, --file, --key "
            "and --model are of the first that is no conversion."
        ),
    ] = None,
    file: File = None,
    key: Key = None,
    model: Model = None,
    settings: Deployment = None,
    switch: Annotated[
        list[str] | None,
        typer.Option(
            "--prompt-at",
            "--switch",
            metavar="TIME:PROMPT",
            help="Another prompt from then on, for all clips: '20s:a dog', or '80:a dog' in latent "
            "frames; repeat for more.",
        ),
    ] = None,
    keep_sink: Annotated[
        bool, typer.Option(help="At a switch, keep what the sink holds of the first prompt.")
    ] = True,
    prefix: Annotated[
        Path | None,
        typer.Option(
            "--prefix",
            "--image",
            metavar="FILE",
            help="An image or a video that the clip begins with, and goes on from.",
        ),
    ] = None,
    base: Base = None,
    vae_tiling: Annotated[
        bool,
        typer.Option(
            "--vae-tiling",
            help="Decode frames, and encode those of --prefix, in overlapping tiles: less memory.",
            rich_help_panel="Wan's text encoder and VAE",
        ),
    ] = MediaConfig.vae_tiling,
    cpu_offload: Annotated[
        bool,
        typer.Option(
            "--cpu-offload",
            help="Keep both in host memory, and on the GPU only while they work.",
            rich_help_panel="Wan's text encoder and VAE",
        ),
    ] = MediaConfig.cpu_offload,
    bytes_per_token: BytesPerToken = None,
    cut: Cut = None,
    rank: Rank = None,
    cache_dtype: CacheDtype = RuntimeConfig.cache_dtype,
    base_model: BaseModel = None,
    loras: Loras = None,
    backend: Annotated[
        str,
        typer.Option(
            help="How MLA layers attend: materialised (keys and values rebuilt), absorbed, or "
            "auto, the faster one; it may be another on another machine."
        ),
    ] = RuntimeConfig.backend,
    tile_mib: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Most MiB of rebuilt keys and values at a time. Default: 64, on a GPU 1024.",
        ),
    ] = RuntimeConfig.tile_mib,
    offload: Annotated[
        bool, typer.Option("--offload", help="Keep the cache in host memory.")
    ] = RuntimeConfig.offload,
    dtype: Annotated[
        str | None,
        typer.Option(help="Of weights and cache: float32 or bfloat16, the default on a GPU."),
    ] = None,
    compiled: Annotated[
        bool,
        typer.Option("--compile", help="Compile all but the self-attention; for long rollouts."),
    ] = False,
    json: Json = False,
) -> None:
    """Generate video from prompts, written as it comes; its first frame lands beside as a PNG.

    With --compare, clips are kept until both are done, and a contact sheet lands there instead.
    """
    import torch

    from vmla_convert.generating.film import (
        check_comparable,
        check_video_path,
        write_comparison,
        write_film,
    )
    from vmla_convert.generating.generate import clip_frames, decoded, parse_switch, track_chunks
    from vmla_convert.generating.generate import generate as run
    from vmla_convert.generating.prefix import read_prefix
    from vmla_convert.layers.runtime import check_runtime
    from vmla_convert.loading.load import build, compute_device, open_named
    from vmla_convert.media.base import latent_frames_per_second
    from vmla_convert.media.open import check_prompts, open_media
    from vmla_convert.media.prompts import EncodedPrompts

    out.json = json
    check_video_path(video)
    if dtype not in (None, "float32", "bfloat16"):
        raise ConfigError(f"no dtype '{dtype}'", "use float32 or bfloat16")
    options = {
        "cache_dtype": cache_dtype,
        "backend": backend,
        "tile_mib": tile_mib,
        "offload": offload,
    }
    size = asked_size(bytes_per_token, cut, rank)
    runtime = replace(from_dict(RuntimeConfig, options), size=size)
    names = [checkpoint, *([compare] if compare else [])]
    labels = _labels(names)
    told = SourceConfig(
        file=file,
        key=key,
        model=model,
        overrides=tuple(settings or ()),
        loras=tuple(loras or ()),
        base_model=base_model,
    )
    sources = _sources(names, told)
    opened = {label: open_named(s) for label, s in zip(labels, sources, strict=True)}
    # Beside a dense model that is compared, the options are the converted model's.
    ways = {
        label: RuntimeConfig(offload=offload) if compare and source.config.is_dense else runtime
        for label, source in opened.items()
    }
    for label, source in opened.items():
        check_runtime(source.config, ways[label])
    check_comparable([source.config for source in opened.values()])
    first = next(iter(opened.values()))
    rate = latent_frames_per_second(first.config)
    length = clip_frames(seconds, frames, rate)
    switches = [parse_switch(text, len(prompt), keep_sink, rate) for text in switch or ()]
    named = [*prompt, *(told for one in switches for told in one.prompts)]
    check_prompts(first.config, named)
    device = compute_device()
    precision = getattr(torch, dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    how = MediaConfig(base, vae_tiling, cpu_offload)
    media = open_media(first.config, how, first.model_path, device, precision)
    given = read_prefix(prefix, media, first.config.latent_size, length) if prefix else None
    clips: dict[str, Tensor] = {}
    sizes: dict[str, int] = {}
    written: list[Path] = []
    with out.progress() as progress:
        # The demo's are read at once.
        text = EncodedPrompts(media, named, progress if first.config.media == "wan" else None)

        def chunks_of(label: str) -> Iterator[Tensor]:
            """What a model makes; only while it makes it does it take memory."""
            built, way = build(opened[label], device, precision), ways[label]
            if compiled:
                built.compile_blocks()
            sizes[f"cache of {label} (bytes)"] = built.cache_bytes(len(prompt), way)
            made = run(built, prompt, length, seed, way, switches, text, given)
            task = f"generating ({label})"
            yield from track_chunks(progress, made, task, built.config, length, given)

        if compare:
            clips = {label: decoded(chunks_of(label), media) for label in opened}
        else:
            written = write_film(video, chunks_of(*opened), media, progress)
    out.data(sizes)
    for path in written or write_comparison(video, clips, prompt, media):
        out.path("wrote", path)


def _sources(names: list[str], told: SourceConfig) -> list[SourceConfig]:
    """Each checkpoint with its options: of two, LoRAs go to both, the rest to the one they fit.

    File, key and model belong to the first that is no conversion, the base model to a conversion.
    """
    from vmla_convert.checkpoint.settings import DEPLOYMENT
    from vmla_convert.loading.load import is_conversion

    if len(names) == 1:
        return [replace(told, checkpoint=names[0])]
    # Asking whether a name is a conversion may list a repository: not without need.
    plain = told == SourceConfig()
    converted = [not plain and is_conversion(name) for name in names]
    meant = converted.index(False) if False in converted else 0
    kept = tuple(text for text in told.overrides if text.partition(".")[0] in DEPLOYMENT)
    run = SourceConfig(overrides=kept, loras=told.loras)
    return [
        replace(
            told if place == meant else run,
            checkpoint=name,
            base_model=told.base_model if converted[place] else None,
        )
        for place, name in enumerate(names)
    ]


def _labels(names: list[str]) -> list[str]:
    """A short name for each checkpoint; the whole path where short ones would be the same."""
    if len(set(names)) < len(names):
        raise ConfigError(
            f"{names[0]} cannot be compared with itself", "give another checkpoint to --compare"
        )
    short = [Path(name).name for name in names]
    return short if all(short) and len(set(short)) == len(short) else names
