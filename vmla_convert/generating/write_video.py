"""Generate videos of one checkpoint, or of two from the same noise, into a file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from vmla_convert.checkpoint.families import OpenCheckpoint
from vmla_convert.config import GenerateConfig, MediaConfig, RuntimeConfig, SourceConfig
from vmla_convert.errors import ConfigError
from vmla_convert.generating.film import (
    check_comparable,
    check_video_path,
    write_comparison,
    write_film,
)
from vmla_convert.generating.generate import (
    Switch,
    clip_frames,
    decoded,
    generate,
    parse_switch,
    resume,
    track_chunks,
)
from vmla_convert.generating.prefix import read_prefix
from vmla_convert.generating.stream import stream_clips
from vmla_convert.layers.runtime import check_runtime
from vmla_convert.loading.load import build, compute_device, open_named
from vmla_convert.media.base import latent_frames_per_second
from vmla_convert.media.open import check_prompts, open_media
from vmla_convert.media.prompts import EncodedPrompts
from vmla_convert.progress import Progress, Silent
from vmla_convert.storage.lock import sole_writer


class Written(NamedTuple):
    """What `write_video` made.

    Attributes:
        paths: Files.
        cache_bytes: Bytes of each model's cache, by the name of the model.
    """

    paths: list[Path]
    cache_bytes: dict[str, int]


def write_video(
    path: Path,
    sources: Sequence[SourceConfig],
    config: GenerateConfig,
    runtime: RuntimeConfig | None = None,
    media: MediaConfig | None = None,
    *,
    seconds: float | None = None,
    prompt_at: Sequence[str] = (),
    image: Path | None = None,
    save_stream: Path | None = None,
    resume_stream: Path | None = None,
    progress: Progress | None = None,
) -> Written:
    """Write an mp4, and beside it the first frame or a contact sheet as a PNG.

    Args:
        path: The mp4.
        sources: One checkpoint, or two that are shown side by side.
        config: Prompts, frames and seed.
        runtime: How the model runs; of two models, the converted ones.
        media: Text encoder and VAE.
        seconds: Length of the video, in place of `config.frames`.
        prompt_at: `TIME:PROMPT` texts, as `parse_switch` reads them.
        image: An image or a video that the clips begin with.
        save_stream: File that gets the state at the end.
        resume_stream: Saved state to continue; the length is that of the whole video, and the
            prompts, the seed and the image are those of the state.
        progress: Receives the progress bars.

    Raises:
        CheckpointError: A checkpoint cannot be opened.
        ConfigError: A setting does not fit.
        OutputError: The file exists, or another process writes it.
        VmlaError: The text encoder does not understand a prompt.
    """
    with sole_writer(path):
        settings = config, runtime or RuntimeConfig(), media or MediaConfig()
        length = seconds, prompt_at, image, _Streams(save_stream, resume_stream)
        return _write_video(path, sources, *settings, *length, progress or Silent())


def _write_video(
    path: Path,
    sources: Sequence[SourceConfig],
    config: GenerateConfig,
    runtime: RuntimeConfig,
    media: MediaConfig,
    seconds: float | None,
    prompt_at: Sequence[str],
    image: Path | None,
    streams: _Streams,
    progress: Progress,
) -> Written:
    check_video_path(path)
    if (streams.save or streams.resume) and len(sources) > 1:
        raise ConfigError("a stream is of one model", "leave --compare or the stream out")
    if streams.resume and image:
        raise ConfigError("a video that continues begins with no image", "leave --image out")
    names = _names([source.checkpoint for source in sources])
    opened = {name: open_named(source) for name, source in zip(names, sources, strict=True)}
    job = _Job(opened, _runtimes(opened, runtime), config, runtime, streams, progress)
    for name, source in opened.items():
        check_runtime(source.config, job.runtimes[name])
    check_comparable([source.config for source in opened.values()])
    first = next(iter(opened.values()))
    rate = latent_frames_per_second(first.config)
    frames = clip_frames(seconds, None if seconds is not None else config.frames, rate)
    begun = list(config.prompts) if streams.resume is None else []
    clips = len(begun) if streams.resume is None else stream_clips(streams.resume)
    switches = [parse_switch(text, clips, config.keep_sink, rate) for text in prompt_at]
    prompts = [*begun, *(prompt for switch in switches for prompt in switch.prompts)]
    check_prompts(first.config, prompts)
    own = open_media(first.config, media, first.model_path, job.device, job.dtype)
    prefix = read_prefix(image, own, first.config.latent_size, frames) if image else None
    # The demo world encodes prompts at once; Wan's text encoder takes a while.
    text = EncodedPrompts(own, prompts, progress if first.config.media == "wan" else None)
    chunks = {name: job.chunks(name, frames, clips, switches, text, prefix) for name in opened}
    if len(opened) == 1:
        film = write_film(path, chunks[names[0]], own, progress, job.past)
        return Written(film, job.cache_bytes)
    pixels = {name: decoded(made, own) for name, made in chunks.items()}
    return Written(write_comparison(path, pixels, list(config.prompts), own), job.cache_bytes)


class _Streams(NamedTuple):
    """Files of saved states: the one to write, and the one to continue."""

    save: Path | None
    resume: Path | None


class _Job:
    """Models that are built when their turn comes, so that only one is in memory."""

    def __init__(
        self,
        opened: Mapping[str, OpenCheckpoint],
        runtimes: Mapping[str, RuntimeConfig],
        config: GenerateConfig,
        runtime: RuntimeConfig,
        streams: _Streams,
        progress: Progress,
    ) -> None:
        self.streams, self._past = streams, None
        self.opened, self.runtimes, self.config = opened, runtimes, config
        self.progress, self.compile = progress, runtime.compile
        self.device = compute_device()
        usual = "bfloat16" if self.device.type == "cuda" else "float32"
        self.dtype: torch.dtype = getattr(torch, runtime.dtype or usual)
        self.cache_bytes: dict[str, int] = {}

    def past(self) -> Tensor | None:
        """Frames before the first chunk of a video that continues; None for a new video."""
        return self._past

    def chunks(
        self,
        name: str,
        frames: int,
        clips: int,
        switches: Sequence[Switch],
        text: EncodedPrompts,
        prefix: Tensor | None,
    ) -> Iterator[Tensor]:
        """Chunks of latents of one model."""
        model, runtime = build(self.opened[name], self.device, self.dtype), self.runtimes[name]
        if self.compile:
            model.compile_blocks()
        self.cache_bytes[name] = model.cache_bytes(clips, runtime)
        if self.streams.resume:
            made = resume(model, self.streams.resume, frames, runtime, switches, text)
        else:
            prompts, seed = list(self.config.prompts), self.config.seed
            made = generate(model, prompts, frames, seed, runtime, switches, text, prefix)
        self._past = made.past
        label, left = f"generating ({name})", frames - made.frames
        yield from track_chunks(self.progress, made, label, model.config, left, prefix)
        if self.streams.save:
            made.save(self.streams.save)


def _runtimes(
    opened: Mapping[str, OpenCheckpoint], runtime: RuntimeConfig
) -> dict[str, RuntimeConfig]:
    """The runtime for each model; a dense model beside another one keeps its whole cache."""
    plain = RuntimeConfig(offload=runtime.offload)
    return {
        name: plain if len(opened) > 1 and source.config.is_dense else runtime
        for name, source in opened.items()
    }


def _names(checkpoints: list[str]) -> list[str]:
    """Short names of checkpoints; whole paths where short names would be equal."""
    if len(set(checkpoints)) < len(checkpoints):
        raise ConfigError(
            f"{checkpoints[0]} cannot be compared with itself",
            "give another checkpoint to --compare",
        )
    short = [Path(name).name for name in checkpoints]
    return short if all(short) and len(set(short)) == len(short) else checkpoints
