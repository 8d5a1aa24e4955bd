"""Generate video chunk by chunk: an iterator of clean latents; everything else consumes it."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from vmla_convert.checkpoint.output import refuse_existing
from vmla_convert.config import ModelConfig, RuntimeConfig
from vmla_convert.errors import ConfigError, OutputError
from vmla_convert.generating.rollout import NewPrompt, rollout
from vmla_convert.layers.dit import CausalWanModel
from vmla_convert.media.clips import seeded
from vmla_convert.media.models import (
    Media,
    TextEncoder,
    VideoVAE,
    open_media,
)
from vmla_convert.media.video import (
    contact_sheet,
    fit_frame,
    open_mp4,
    partial_path,
    read_frames,
    side_by_side,
    write_mp4,
    write_png,
)
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
    text: TextEncoder | None = None,
    prefix: Tensor | None = None,
) -> Iterator[Tensor]:
    """Yield clean latent chunks (B, F, C, height, width), one prompt each row.

    The cache keeps the model's window, so memory does not grow with the length. Noise depends on
    the seed and the chunk alone: a dense model and its conversion start from the same noise.

    Args:
        model: From `load`.
        prompt: One, or a batch of them.
        frames: Latent frames; the last chunk is cut to it.
        seed: Of all noise.
        runtime: Place of the cache, and how it is read.
        switches: Where other prompts take over; the window is then written again under them.
        text: What reads the prompts, all of them before the first chunk; by default the model's
            own, opened anew.
        prefix: Clean latents (1 or B, P, C, height, width) that the video begins with. They are
            yielded too, and count among `frames`.

    Raises:
        ConfigError: `frames` is not positive or all prefix, the prefix does not fit, a switch has
            another number of prompts or comes after the last chunk, or the model cannot be run so.
        VmlaError: The model's text encoder cannot read a prompt.
    """
    prompts, config = [prompt] if isinstance(prompt, str) else prompt, model.config
    if prefix is not None:
        _check_prefix(prefix, config, len(prompts))
        prefix = prefix.expand(len(prompts), -1, -1, -1, -1)
    given = 0 if prefix is None else prefix.shape[1]
    if frames <= given:
        raise ConfigError(
            f"frames {frames} must be at least {given + 1}",
            "ask for more frames than the prefix has" if given else "",
        )
    starts = range(given, frames, config.chunk_frames)
    switches = sorted(switches, key=lambda switch: switch.frame)
    _check_switches(switches, len(prompts), starts)
    text = text or open_media(config, device=model.patch_embedding.weight.device)
    chunks = rollout(
        model,
        len(starts),
        _prompt_schedule(prompts, switches, text),
        lambda index: [seeded(seed, index, "rollout")],
        runtime,
        prefix,
    )
    del text
    made = 0
    for chunk in chunks:
        yield chunk[:, : frames - made]
        made += chunk.shape[1]


def _prompt_schedule(
    prompts: list[str], switches: list[Switch], text: TextEncoder
) -> Callable[[int], NewPrompt | None]:
    """Encode all prompts in one call and return which of them takes over at a frame.

    One call moves an encoder that waits in host memory to the device only once. The schedule does
    not keep the encoder, so that an encoder opened by `generate` is freed before the first chunk.
    """
    named = [*prompts, *(prompt for switch in switches for prompt in switch.prompts)]
    first, *others = text.encode_prompts(named).split(len(prompts))
    waiting = deque([(0, NewPrompt(first))])
    for switch, context in zip(switches, others, strict=True):
        waiting.append((switch.frame, NewPrompt(context, keep_sink=switch.keep_sink)))

    def due(frame: int) -> NewPrompt | None:
        latest = None
        while waiting and waiting[0][0] <= frame:
            _, latest = waiting.popleft()
        return latest

    return due


def check_comparable(models: Sequence[ModelConfig]) -> None:
    """Models that are shown side by side read the same prompts and make the same latents.

    Raises:
        ConfigError: They do not.
    """
    kinds = [
        {
            "media": model.media,
            "channels": model.geometry.in_dim,
            "width of contexts": model.geometry.text_dim,
            "length of contexts": model.geometry.text_len,
            "latent_size": model.latent_size,
            "frames_per_second": model.frames_per_second,
        }
        for model in models
    ]
    for name in kinds[0]:
        if len(values := dict.fromkeys(kind[name] for kind in kinds)) > 1:
            raise ConfigError(
                f"the models to compare differ in {name}: {' and '.join(map(str, values))}",
                "compare a conversion with the dense checkpoint that it came from, and --set what "
                "was set for converting",
            )


def _check_prefix(prefix: Tensor, config: ModelConfig, clips: int) -> None:
    wanted = [config.geometry.in_dim, *config.latent_size]
    fits = prefix.ndim == 5 and prefix.shape[0] in (1, clips) and prefix.shape[1] > 0
    if not fits or list(prefix.shape[2:]) != wanted:
        raise ConfigError(
            f"a prefix of shape {list(prefix.shape)} does not fit {clips} clips of frames {wanted}",
            "encode it with this model's own VAE, one for all clips or one for each",
        )


def _check_switches(switches: list[Switch], clips: int, starts: range) -> None:
    for switch in switches:
        if len(switch.prompts) != clips:
            raise ConfigError(
                f"{len(switch.prompts)} prompts from frame {switch.frame} on, {clips} before",
                "give as many prompts as there are clips",
            )
        if switch.frame > starts[-1]:
            raise ConfigError(
                f"a switch at frame {switch.frame} comes after the start of the last chunk, "
                f"{starts[-1]}",
                f"switch at frame {starts[-1]} or before, or ask for more frames",
            )


def generate_pixels(
    model: CausalWanModel,
    prompts: list[str],
    frames: int,
    seed: int = 0,
    progress: Progress | None = None,
    label: str = "generating",
    runtime: RuntimeConfig | None = None,
    switches: Sequence[Switch] = (),
    media: Media | None = None,
    prefix: Tensor | None = None,
) -> Tensor:
    """Return a whole video as pixels (B, F', 3, H, W) in −1 … 1. Arguments as in `generate`."""
    config = model.config
    media = media or open_media(config, device=model.patch_embedding.weight.device)
    made = generate(model, prompts, frames, seed, runtime, switches, media, prefix)
    return decoded(track_chunks(progress or Silent(), made, label, config, frames, prefix), media)


def decoded(chunks: Iterable[Tensor], media: VideoVAE) -> Tensor:
    """All chunks (B, F, C, h, w) of a rollout as pixels (B, F', 3, H, W) in −1 … 1, on the CPU."""
    return media.decode(torch.cat(list(chunks), dim=1)).float().cpu().clamp(-1, 1)


def track_chunks(
    progress: Progress,
    chunks: Iterable[Tensor],
    label: str,
    config: ModelConfig,
    frames: int,
    prefix: Tensor | None = None,
) -> Iterator[Tensor]:
    """Yield what `generate` yields for such a model, frames and prefix, and draw how far it is."""
    size = config.chunk_frames
    given = 0 if prefix is None else prefix.shape[1]
    total = -(-given // size) + -((given - frames) // size)
    return progress.track(chunks, label, total)


def clip_frames(seconds: float | None, frames: int | None, rate: float) -> int:
    """Latent frames of a clip, asked for either way; 20 by default.

    Raises:
        ConfigError: Both ways, or for no time at all.
    """
    if seconds is None:
        return 20 if frames is None else frames
    if frames is not None:
        raise ConfigError("--seconds and --frames both say how long", "give one of them")
    if not seconds > 0 or seconds == float("inf"):
        raise ConfigError(f"{seconds:g} seconds are no time", "try --seconds 60")
    return max(1, round(seconds * rate))


def parse_switch(text: str, clips: int, keep_sink: bool, rate: float) -> Switch:
    """`FRAME:PROMPT` or `SECONDSs:PROMPT`, the same prompt for all clips.

    Args:
        text: What the user wrote.
        clips: How many.
        keep_sink: As of `Switch`.
        rate: Latent frames a second.

    Raises:
        ConfigError: It is no such thing.
    """
    match = re.fullmatch(r"\s*(?:(\d+)|(\d+(?:\.\d+)?)\s*s)\s*:(.*)", text, re.DOTALL)
    if match is None or not match[3].strip():
        raise ConfigError(
            f"'{text}' is not FRAME:PROMPT or SECONDSs:PROMPT",
            'try --prompt-at "20s:a bouncing three"',
        )
    frame = int(match[1]) if match[1] else round(float(match[2]) * rate)
    return Switch(frame, [match[3].strip()] * clips, keep_sink)


def read_prefix(path: Path, media: VideoVAE, latent_size: tuple[int, int], frames: int) -> Tensor:
    """Latents (1, P, C, height, width) of an image or a video that a clip is to begin with.

    Frames are taken as they come, at any rate, cut to the model's size at the centre. Where a video
    has frames that do not fill a latent one, the first ones are left out, so that what follows goes
    on from its end.

    Args:
        path: Of anything that PyAV plays.
        media: Of the model.
        latent_size: Height and width.
        frames: Latent frames of the whole clip.

    Raises:
        ConfigError: The file cannot be read, or is as long as the clip.
        MissingExtraError: PyAV is not installed.
    """
    if not path.is_file():
        raise ConfigError(f"no image or video at {path}", "give a file: --image FILE")
    most, *size = media.pixel_shape(frames, latent_size)
    pixels = [fit_frame(frame, size) for frame in islice(read_frames(path), most)]
    if len(pixels) == most:
        raise ConfigError(
            f"{path} fills all {frames} latent frames of the clip", "ask for more: --seconds 60"
        )
    fitting = (media.pixel_shape(count, latent_size)[0] for count in range(frames, 0, -1))
    count = next((count for count in fitting if count <= len(pixels)), 0)
    if not count:
        raise ConfigError(f"{path} holds no frame", "give another image or video")
    return media.encode(torch.stack(pixels[-count:])[None])


def check_video_path(path: Path) -> None:
    """Refuse, before any work, a path that `write_film` or `write_clips` must not write to.

    Args:
        path: Of the mp4; the picture beside it is checked too.

    Raises:
        OutputError: A file exists, or the path is no mp4.
    """
    if path.suffix != ".mp4":
        raise OutputError(f"{path} does not end in .mp4", "try -o clip.mp4")
    # The first frame of a run that was killed lies beside what it had of the video.
    killed = partial_path(path).exists()
    for file in (path, *(() if killed else (_picture_path(path),))):
        refuse_existing(file)


def write_film(
    path: Path, chunks: Iterable[Tensor], media: VideoVAE, progress: Progress | None = None
) -> list[Path]:
    """Write a rollout as it comes, in memory that does not grow with its length.

    The first frame stands in a PNG beside the mp4 as soon as it is decoded; when something goes
    wrong after that, neither file stays.

    Args:
        path: Of the mp4; the PNG takes its name.
        chunks: Latents (B, F, C, height, width) of B clips, shown one below the other.
        media: That decodes them.
        progress: Where to tell of the first frame.
    """
    progress = progress or Silent()
    decoder, picture, shown = media.decoder(), _picture_path(path), False
    try:
        with open_mp4(path, media.frames_per_second, media.enlarged) as write:
            for chunk in chunks:
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


def write_clips(
    path: Path, clips: dict[str, Tensor], prompts: list[str], media: VideoVAE
) -> list[Path]:
    """Write rollouts of the same prompts as one mp4 and one contact sheet beside it.

    Args:
        path: Of the mp4; the sheet takes its name with .png.
        clips: Rollouts (B, F, 3, H, W) by the name of the model, shown side by side in this order.
        prompts: B of them, one below the other.
        media: That decoded them.
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
    sheet = _picture_path(path)
    write_mp4(path, torch.cat(list(joined), dim=-2), media.frames_per_second, media.enlarged)
    contact_sheet(sheet, rows, scale=-(-media.enlarged // 2), group=len(clips))
    return [path, sheet]


def _picture_path(video: Path) -> Path:
    return video.with_suffix(".png")
