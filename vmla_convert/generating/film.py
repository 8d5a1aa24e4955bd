"""Write generated video to files: one model's as it is generated, or several models' side by side.

Latents have the shape (B, F, C, h, w), decoded pixels (B, F', 3, H, W) in −1 … 1: B clips, F latent
and F' pixel frames.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from vmla_convert.config import ModelConfig
from vmla_convert.errors import ConfigError, OutputError, refuse_existing
from vmla_convert.media.base import Media
from vmla_convert.media.video import (
    contact_sheet,
    open_mp4,
    partial_path,
    side_by_side,
    write_mp4,
    write_png,
)
from vmla_convert.progress import Progress, Silent


def check_video_path(path: Path) -> None:
    """Refuse, before any work, an mp4 that exists or has a picture beside it."""
    if path.suffix != ".mp4":
        raise OutputError(f"{path} does not end in .mp4", "try -o clip.mp4")
    # A killed run leaves its first frame beside the partial video; both may be replaced.
    killed = partial_path(path).exists()
    for file in (path, *(() if killed else (_picture_path(path),))):
        refuse_existing(file)


def write_film(
    path: Path,
    chunks: Iterable[Tensor],
    media: Media,
    progress: Progress | None = None,
    past: Callable[[], Tensor | None] | None = None,
) -> list[Path]:
    """Write chunks of latents as they come, in memory that does not grow with the length.

    The first frame lands in a PNG beside the mp4 as soon as it is decoded. After an error, neither
    file stays.

    Args:
        path: The mp4; the PNG has the same stem.
        chunks: Latents. The clips are shown one below the other.
        media: Decodes the chunks.
        progress: Announces the first frame.
        past: Gives the latents before the first chunk, once that chunk is there. A decoder that
            remembers frames sees them, and they are not written.
    """
    progress = progress or Silent()
    decoder, picture, shown = media.decoder(), _picture_path(path), False
    try:
        with open_mp4(path, media.frames_per_second, media.enlarged) as write:
            for chunk in chunks:
                if past is not None and not shown and (before := past()) is not None:
                    deque(decoder.decode(before), maxlen=0)
                frames = torch.cat(list(decoder.decode(chunk)), dim=-2)
                if not shown:
                    write_png(picture, frames[0], media.enlarged)
                    progress.note(f"first frame: {picture}")
                    shown = True
                write(frames)
    except BaseException:
        if shown:
            picture.unlink(missing_ok=True)
        raise
    return [path, picture]


def check_comparable(models: Sequence[ModelConfig]) -> None:
    """Refuse models that take different prompts or make different latents."""
    names = ("media", "latent_size", "frames_per_second")
    inner = ("in_dim", "text_dim", "text_len")
    for name in names + inner:
        values = dict.fromkeys(
            getattr(model.geometry if name in inner else model, name) for model in models
        )
        if len(values) > 1:
            raise ConfigError(
                f"the models to compare differ in {name}: {' and '.join(map(str, values))}",
                "compare a conversion with its dense checkpoint, and repeat the settings "
                "--set model.KEY=VALUE of the conversion",
            )


def write_comparison(
    path: Path, clips: dict[str, Tensor], prompts: list[str], media: Media
) -> list[Path]:
    """Write several models' videos of the same prompts as one mp4 and a contact sheet beside it.

    Args:
        path: The mp4; the sheet is a PNG of the same stem.
        clips: Pixels by the name of the model, shown from left to right.
        prompts: One for each clip; clips are shown from top to bottom.
        media: Media of the models.
    """
    columns = list(clips.values())
    joined = columns[0]
    for video in columns[1:]:
        joined = torch.stack([side_by_side(a, b) for a, b in zip(joined, video, strict=True)])
    sheet = _picture_path(path)
    write_mp4(path, torch.cat(list(joined), dim=-2), media.frames_per_second, media.enlarged)
    rows = comparison_rows(clips, prompts)
    contact_sheet(sheet, rows, scale=-(-media.enlarged // 2), group=len(clips))
    return [path, sheet]


def comparison_rows(
    clips: dict[str, Tensor], prompts: Sequence[str], difference: bool = False
) -> list[tuple[str, Tensor]]:
    """Return labelled rows for `contact_sheet`: for each prompt the video of every model.

    Args:
        clips: Pixels by the name of the model.
        prompts: One for each clip.
        difference: Add a row with half the difference between the last and the first model, so
            that grey means equal.
    """
    rows: list[tuple[str, Tensor]] = []
    for index, prompt in enumerate(prompts):
        rows += [(f"{name} · {prompt}", video[index]) for name, video in clips.items()]
        if difference:
            first, *_, last = clips.values()
            rows.append(("difference", (last[index] - first[index]) / 2))
    return rows


def _picture_path(video: Path) -> Path:
    return video.with_suffix(".png")
