"""Generate videos of one checkpoint, or of two from the same noise, into a file."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
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
from vmla_convert.generating.launch import ONE, Group
from vmla_convert.generating.prefix import read_prefix
from vmla_convert.generating.stream import stream_clips
from vmla_convert.layers.runtime import check_runtime
from vmla_convert.loading.load import build, compute_device, open_named
from vmla_convert.media.base import Media, latent_frames_per_second
from vmla_convert.media.open import check_prompts, open_media
from vmla_convert.media.prompts import EncodedPrompts
from vmla_convert.progress import Progress, Silent
from vmla_convert.storage.lock import sole_writer


class Written(NamedTuple):
    """The files that `write_video` made.

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
    group: Group = ONE,
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
        group: Processes that compute the videos together, each of which makes this call. Process 0
            writes.

    Raises:
        CheckpointError: A checkpoint cannot be opened.
        ConfigError: A setting does not fit.
        OutputError: The file exists, or another process writes it.
        VmlaError: The text encoder does not understand a prompt.
    """
    with sole_writer(path) if group.leads else nullcontext():
        settings = config, runtime or RuntimeConfig(), media or MediaConfig()
        length = seconds, prompt_at, image, _Streams(save_stream, resume_stream)
        return _write_video(path, sources, *settings, *length, progress or Silent(), group)


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
    group: Group,
) -> Written:
    if group.leads:
        check_video_path(path)
    if (streams.save or streams.resume) and len(sources) > 1:
        raise ConfigError("a stream is of one model", "leave --compare or the stream out")
    if streams.resume and image:
        raise ConfigError("a video that continues begins with no image", "leave --image out")
    models = open_models(sources, runtime)
    opened, names = {name: model.opened for name, model in models.items()}, list(models)
    runtimes = {name: model.runtime for name, model in models.items()}
    job = _Job(opened, runtimes, config, runtime, streams, progress, group)
    first = next(iter(opened.values()))
    rate = latent_frames_per_second(first.config)
    frames = clip_frames(seconds, None if seconds is not None else config.frames, rate)
    begun = list(config.prompts) if streams.resume is None else []
    clips = len(begun) if streams.resume is None else stream_clips(streams.resume)
    switches = [parse_switch(text, clips, config.keep_sink, rate) for text in prompt_at]
    prompts = [*begun, *(prompt for switch in switches for prompt in switch.prompts)]
    check_prompts(first.config, prompts)
    own = job.media(media) if group.leads else None

    def begin() -> tuple[EncodedPrompts, Tensor | None]:
        assert own is not None
        prefix = read_prefix(image, own, first.config.latent_size, frames) if image else None
        # The demo world encodes prompts at once; Wan's text encoder takes a while.
        told = progress if first.config.media == "wan" else None
        return EncodedPrompts(own, prompts, told), prefix

    text, prefix = group.from_first(begin)
    chunks = {name: job.chunks(name, frames, clips, switches, text, prefix) for name in opened}
    if own is None:
        for made in chunks.values():
            deque(made, maxlen=0)
        return Written([], job.cache_bytes)
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
        group: Group,
    ) -> None:
        self.streams, self._past, self.group = streams, None, group
        self.opened, self.runtimes, self.config = opened, runtimes, config
        self.progress, self.compile = progress, runtime.compile
        self.device, self.dtype = compute_device(), compute_dtype(runtime)
        self.cache_bytes: dict[str, int] = {}

    def media(self, config: MediaConfig) -> Media:
        """Text encoder and VAE of the first model."""
        first = next(iter(self.opened.values()))
        return open_media(first.config, config, first.model_path, self.device, self.dtype)

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
        model.parallel = self.group.parallel(model.config)
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


class OpenModel(NamedTuple):
    """A checkpoint, and how its model runs."""

    opened: OpenCheckpoint
    runtime: RuntimeConfig


def open_models(sources: Sequence[SourceConfig], runtime: RuntimeConfig) -> dict[str, OpenModel]:
    """Open the checkpoints to show, by short name, and check them and their settings.

    Args:
        sources: One checkpoint, or two that are shown side by side.
        runtime: How the model runs. A dense model beside another one keeps its whole cache.

    Raises:
        CheckpointError: A checkpoint cannot be opened.
        ConfigError: A setting does not fit, or the models cannot be compared.
    """
    names, models = _names([source.checkpoint for source in sources]), dict[str, OpenModel]()
    plain = RuntimeConfig(offload=runtime.offload)
    for name, source in zip(names, sources, strict=True):
        opened = open_named(source)
        whole = len(sources) > 1 and opened.config.is_dense
        models[name] = OpenModel(opened, plain if whole else runtime)
        check_runtime(opened.config, models[name].runtime)
    check_comparable([model.opened.config for model in models.values()])
    return models


def compute_dtype(runtime: RuntimeConfig) -> torch.dtype:
    """Dtype of weights and cache."""
    usual = "bfloat16" if compute_device().type == "cuda" else "float32"
    return getattr(torch, runtime.dtype or usual)


def _names(checkpoints: list[str]) -> list[str]:
    """Short names of checkpoints; whole paths where short names would be equal."""
    if len(set(checkpoints)) < len(checkpoints):
        raise ConfigError(
            f"{checkpoints[0]} cannot be compared with itself",
            "give another checkpoint to --compare",
        )
    short = [Path(name).name for name in checkpoints]
    return short if all(short) and len(set(short)) == len(short) else checkpoints
