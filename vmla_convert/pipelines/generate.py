"""Generate video chunk by chunk: an iterator of clean latents; everything else consumes it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from vmla_convert.config import RuntimeConfig
from vmla_convert.errors import ConfigError, OutputError
from vmla_convert.layers.dit import CausalWanModel, Prompt
from vmla_convert.pipelines.codecs import open_codec
from vmla_convert.pipelines.data import seeded
from vmla_convert.pipelines.sample import recache, sample_chunk
from vmla_convert.pipelines.video import contact_sheet, side_by_side, write_mp4
from vmla_convert.progress import Progress, Silent


class Switch(NamedTuple):
    """Other prompts from a frame on.

    Attributes:
        frame: The first chunk that starts at or after it gets them.
        prompts: One each row.
        keep_sink: Keep what the sink holds, written under the first prompts; else the oldest frame
            that is still held begins a new one.
    """

    frame: int
    prompts: list[str]
    keep_sink: bool = True


def generate(
    model: CausalWanModel,
    prompt: str | list[str],
    frames: int,
    seed: int = 0,
    runtime: RuntimeConfig | None = None,
    switches: Sequence[Switch] = (),
) -> Iterator[Tensor]:
    """Yield clean latent chunks (B, F, C, height, width), one prompt each row.

    The cache keeps the model's window, so memory does not grow with the length. Noise depends on
    the seed and the chunk alone: a dense model and its conversion start from the same noise.

    Args:
        model: From `load`.
        prompt: One, or a batch of them.
        frames: Latent frames; the last chunk is cut to it.
        seed: Of all noise.
        runtime: Precision of the cache and how it is read.
        switches: Where other prompts take over; the window is then written again under them.

    Raises:
        ConfigError: `frames` is not positive, a switch has another number of prompts or comes after
            the last chunk, or the model cannot be run so.
        VmlaError: The model's text encoder cannot read a prompt.
    """
    if frames < 1:
        raise ConfigError(f"frames {frames} must be at least 1")
    config = model.config
    prompts = [prompt] if isinstance(prompt, str) else prompt
    waiting = sorted(switches, key=lambda switch: switch.frame)
    _check_switches(waiting, len(prompts), frames, config.chunk_frames)
    contexts = [_encoded(model, names) for names in (prompts, *(s.prompts for s in waiting))]
    cache, current = model.new_cache(len(prompts), runtime), _read(model, contexts.pop(0))
    # Only a switch looks back at latents.
    held = -(-config.cache.window_frames // config.chunk_frames)
    past: deque[Tensor] = deque(maxlen=held if waiting else 0)
    weight = model.patch_embedding.weight
    shape = (len(prompts), config.chunk_frames, config.geometry.in_dim, *config.latent_size)
    for index, start in enumerate(range(0, frames, config.chunk_frames)):
        due = [switch for switch in waiting if switch.frame <= start]
        if due:
            waiting, contexts = waiting[len(due) :], contexts[len(due) - 1 :]
            current = _read(model, contexts.pop(0))
            recache(model, list(past), current, cache, due[-1].keep_sink)
        generator = seeded(seed, index, "rollout")
        draw = partial(torch.randn, shape, generator=generator)
        cache.open_chunk(config.chunk_frames)
        chunk = sample_chunk(model, draw().to(weight), current, cache, draw)
        past.append(chunk)
        yield chunk[:, : frames - start]


def _check_switches(switches: list[Switch], clips: int, frames: int, chunk_frames: int) -> None:
    last = (frames - 1) // chunk_frames * chunk_frames
    for switch in switches:
        if len(switch.prompts) != clips:
            raise ConfigError(
                f"{len(switch.prompts)} prompts from frame {switch.frame} on, {clips} before",
                "give as many prompts as there are clips",
            )
        if switch.frame > last:
            raise ConfigError(
                f"a switch at frame {switch.frame} comes after the start of the last chunk, {last}",
                f"switch at frame {last} or before, or ask for more frames",
            )


def _encoded(model: CausalWanModel, prompts: list[str]) -> Tensor:
    return open_codec(model.config).encode_prompts(prompts).to(model.patch_embedding.weight)


@torch.no_grad()
def _read(model: CausalWanModel, context: Tensor) -> Prompt:
    return model.read_prompt(context)


def rollout(
    model: CausalWanModel,
    prompts: list[str],
    frames: int,
    seed: int = 0,
    progress: Progress | None = None,
    label: str = "generating",
    runtime: RuntimeConfig | None = None,
    switches: Sequence[Switch] = (),
) -> Tensor:
    """A whole rollout as pixels (B, frames, 3, H, W) in −1 … 1."""
    progress = progress or Silent()
    chunks = -(-frames // model.config.chunk_frames)
    made = generate(model, prompts, frames, seed, runtime, switches)
    latents = list(progress.track(made, label, chunks))
    return open_codec(model.config).decode(torch.cat(latents, dim=1)).float().cpu().clamp(-1, 1)


def parse_switch(text: str, clips: int, keep_sink: bool) -> Switch:
    """`FRAME:PROMPT`, the same prompt for all clips.

    Raises:
        ConfigError: It is no such thing.
    """
    frame, colon, prompt = text.partition(":")
    if not (colon and frame.strip().isdecimal() and prompt.strip()):
        raise ConfigError(f"'{text}' is not FRAME:PROMPT", 'try --switch "40:a bouncing three"')
    return Switch(int(frame), [prompt.strip()] * clips, keep_sink)


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
