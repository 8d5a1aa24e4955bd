"""Generate video chunk by chunk: an iterator of clean latents; everything else consumes it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from vmla_convert.errors import ConfigError, OutputError
from vmla_convert.layers.dit import CausalWanModel
from vmla_convert.pipelines.codecs import open_codec
from vmla_convert.pipelines.data import seeded
from vmla_convert.pipelines.sample import sample_chunk
from vmla_convert.pipelines.video import contact_sheet, side_by_side, write_mp4
from vmla_convert.progress import Progress, Silent


def generate(
    model: CausalWanModel, prompt: str | list[str], frames: int, seed: int = 0
) -> Iterator[Tensor]:
    """Yield clean latent chunks (B, F, C, height, width), one prompt each row.

    The cache keeps the model's window, so memory does not grow with the length. Noise depends on
    the seed and the chunk alone: a dense model and its conversion start from the same noise.

    Args:
        model: From `load`.
        prompt: One, or a batch of them.
        frames: Latent frames; the last chunk is cut to it.
        seed: Of all noise.

    Raises:
        ConfigError: `frames` is not positive.
        VmlaError: The model's text encoder cannot read a prompt.
    """
    if frames < 1:
        raise ConfigError(f"frames {frames} must be at least 1")
    config = model.config
    prompts = [prompt] if isinstance(prompt, str) else prompt
    weight = model.patch_embedding.weight
    context = open_codec(config).encode_prompts(prompts).to(weight)
    cache = model.new_cache(len(prompts))
    shape = (len(prompts), config.chunk_frames, config.geometry.in_dim, *config.latent_size)
    for index, start in enumerate(range(0, frames, config.chunk_frames)):
        generator = seeded(seed, index, "rollout")
        noise = torch.randn(shape, generator=generator).to(weight)
        cache.open_chunk(config.chunk_frames)
        chunk = sample_chunk(model, noise, context, cache, generator)
        yield chunk[:, : frames - start]


def rollout(
    model: CausalWanModel,
    prompts: list[str],
    frames: int,
    seed: int = 0,
    progress: Progress | None = None,
    label: str = "generating",
) -> Tensor:
    """A whole rollout as pixels (B, frames, 3, H, W) in −1 … 1."""
    progress = progress or Silent()
    chunks = -(-frames // model.config.chunk_frames)
    latents = list(progress.track(generate(model, prompts, frames, seed), label, chunks))
    return open_codec(model.config).decode(torch.cat(latents, dim=1)).float().cpu().clamp(-1, 1)


def check_video_path(path: Path) -> None:
    """Refuse, before any work, a path that `write_clips` must not write to.

    Args:
        path: Of the mp4; the contact sheet beside it is checked too.

    Raises:
        OutputError: A file exists, or the path is no mp4.
    """
    if path.suffix != ".mp4":
        raise OutputError(f"{path} does not end in .mp4", "try -o clip.mp4")
    for file in (path, _sheet_path(path)):
        if file.exists():
            raise OutputError(f"{file} exists already", "choose another -o, or remove it")


def write_clips(path: Path, clips: dict[str, Tensor], prompts: list[str]) -> list[Path]:
    """Write rollouts of the same prompts as one mp4 and one contact sheet beside it.

    Args:
        path: Of the mp4; the sheet takes its name with .png.
        clips: Rollouts (B, F, 3, H, W) by the name of the model, shown side by side in this order.
        prompts: B of them, one below the other.
    """
    rows = [
        (f"{name} · {prompt}", video[index])
        for index, prompt in enumerate(prompts)
        for name, video in clips.items()
    ]
    columns = list(clips.values())
    joined = columns[0]
    for video in columns[1:]:
        joined = torch.stack([side_by_side(a, b) for a, b in zip(joined, video, strict=True)])
    sheet = _sheet_path(path)
    write_mp4(path, torch.cat(list(joined), dim=-2))
    contact_sheet(sheet, rows, group=len(clips))
    return [path, sheet]


def _sheet_path(video: Path) -> Path:
    return video.with_suffix(".png")
