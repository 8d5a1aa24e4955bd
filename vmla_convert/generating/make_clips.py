"""Make training clips of latents: sampled from the dense model, or encoded from video files."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, cycle, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vmla_convert import __version__
from vmla_convert.config import DataConfig, MediaConfig, ModelConfig
from vmla_convert.errors import ConfigError, OutputError
from vmla_convert.generating.generate import generate
from vmla_convert.layers.dit import CausalWanModel
from vmla_convert.media.base import Media
from vmla_convert.media.clips import seeded, source_kind, video_files
from vmla_convert.media.open import check_prompts, open_media
from vmla_convert.media.prompts import read_prompts
from vmla_convert.media.video import check_playable, fit_frame, read_frames
from vmla_convert.progress import Progress, Silent
from vmla_convert.storage.output import partial_folder
from vmla_convert.storage.tensor_store import FolderStore, Tensors
from vmla_convert.tables import to_dict

CLIPS_PER_SHARD = 8
CACHE_BYTES_AT_ONCE = 8 << 30
"""Limit for the caches of clips that are sampled together. One clip of Wan 1.3B takes 6 GiB."""


def prepare_clips(
    config: DataConfig,
    dense: CausalWanModel,
    folder: Path,
    origin: Any,
    progress: Progress | None = None,
    media: Media | None = None,
) -> DataConfig:
    """Write clips that need a model as latents, and return the config of these latents.

    Clips of the demo world, and clips that are latents already, are returned unchanged. The same
    call continues interrupted work, which lies in `<folder>.partial/`. Where several processes
    train, only one may call this function.

    Args:
        config: The clips wanted.
        dense: Model that `self` samples from, and whose media encode videos.
        folder: Gets shards of `latents` and `context`; appears when it is complete. A folder that
            holds exactly these clips is used again.
        origin: Identifies the dense model's weights, as JSON data, such as the `source` of a
            conversion's record.
        progress: Draws a bar.
        media: Default: the model's own media.

    Raises:
        CheckpointError: The model's text encoder and VAE are not there.
        ConfigError: There are no clips or too few, or a video cannot be read or has no prompt, or
            no text encoder and VAE are known for the model.
        MissingExtraError: PyAV, or the extra [wan] for encoding, is not installed.
        OutputError: The folder holds something else, or cannot be written.
        VmlaError: The text encoder does not understand a prompt.
    """
    kind = source_kind(config.source)
    if kind in ("demo", "latents"):
        return config
    device = dense.patch_embedding.weight.device
    media = media or open_media(dense.config, MediaConfig(config.base), device=device)
    if kind == "self":
        work = _OwnSamples(config, dense, media, origin, _own_prompts(config, media))
    else:
        work = _Videos.find(config, dense.config, media)
    done = folder.exists()
    # The store refuses a folder of other work.
    store = FolderStore(folder if done else partial_folder(folder), work.identity())
    if not done:
        work.check()
        for index, shard in enumerate(work.shards(progress or Silent())):
            if not store.has(name := f"clips-{index:05d}"):
                store.put(name, shard())
        _publish(store.folder, folder)
    return replace(config, source=str(folder))


def check_makeable(config: DataConfig, model: ModelConfig, media: Media) -> None:
    """Refuse clips that `prepare_clips` cannot make, before the model's weights are loaded.

    Raises:
        ConfigError: A prompt is missing, or a video cannot be opened.
        MissingExtraError: PyAV is not installed.
        VmlaError: The text encoder does not understand a prompt.
    """
    if source_kind(config.source) == "self":
        check_prompts(model, _own_prompts(config, media))
    elif source_kind(config.source) == "videos":
        _Videos.find(config, model, media).check()


@dataclass(frozen=True)
class _OwnSamples:
    """Clips sampled from the dense model; the prompts take turns."""

    config: DataConfig
    dense: CausalWanModel
    media: Media
    origin: Any
    prompts: tuple[str, ...]

    def identity(self) -> Any:
        """Return everything that the latents depend on."""
        config = self.config
        how = [config.frames, config.clips, config.seed, self.prompts, self.media.name]
        return [__version__, how, to_dict(self.dense.config), self.origin]

    def check(self) -> None:
        """Refuse prompts that the text encoder does not understand."""
        check_prompts(self.dense.config, self.prompts)

    def shards(self, progress: Progress) -> Iterator[Callable[[], Tensors]]:
        """Yield a function that samples a shard, for each shard."""
        prompts = list(islice(cycle(self.prompts), self.config.clips))
        size = self._clips_at_once()
        batches = [prompts[start : start + size] for start in range(0, len(prompts), size)]
        for index, batch in enumerate(progress.track(batches, "sampling clips")):
            yield partial(self._sample, batch, index)

    def _sample(self, prompts: list[str], index: int) -> Tensors:
        """Sample a shard from its own noise, so that resumed work gives the same clips."""
        seed = seeded(self.config.seed, index, "self").initial_seed()
        frames, text = self.config.frames, self.media
        chunks = list(generate(self.dense, prompts, frames, seed, text=text))
        # Latents keep the model's dtype: bfloat16 loses nothing and takes half the space.
        latents = torch.cat(chunks, dim=1).cpu()
        return {"latents": latents, "context": self.media.encode_prompts(prompts)}

    def _clips_at_once(self) -> int:
        """Return a batch size that does not depend on free memory, because noise depends on it."""
        model = self.dense.config
        each = model.cache_bytes(model.cache.window_frames)
        return max(1, min(CLIPS_PER_SHARD, CACHE_BYTES_AT_ONCE // each))


@dataclass(frozen=True)
class _Videos:
    """Consecutive clips of video files, without the frames at a file's end that fill no clip."""

    config: DataConfig
    model: ModelConfig
    media: Media
    prompts: dict[Path, str]

    @classmethod
    def find(cls, config: DataConfig, model: ModelConfig, media: Media) -> _Videos:
        """Find the videos and their prompts."""
        files = video_files(Path(config.source))
        return cls(config, model, media, {file: _prompt_of(file, config) for file in files})

    def identity(self) -> Any:
        """Return what the latents depend on; sizes and times stand for the files' contents."""
        root = Path(self.config.source)
        root = root if root.is_dir() else root.parent
        stats = [(file, file.stat(), prompt) for file, prompt in self.prompts.items()]
        videos = [
            [file.relative_to(root).as_posix(), stat.st_size, stat.st_mtime_ns, prompt]
            for file, stat, prompt in stats
        ]
        how = [self.media.name, self.model.latent_size, self.config.frames]
        return [__version__, how, videos]

    def check(self) -> None:
        """Refuse unknown prompts and files that cannot be opened, without decoding."""
        check_prompts(self.model, self.prompts.values())
        for file in self.prompts:
            check_playable(file)

    def shards(self, progress: Progress) -> Iterator[Callable[[], Tensors]]:
        """Yield a function that encodes a shard, for each shard.

        Resumed work decodes all files again to find where the clips lie. Encoding, which takes
        much longer, is not repeated.
        """
        clips = self._clips(progress)
        first = list(islice(clips, 2))
        if len(first) < 2:
            raise ConfigError(
                f"the videos at {self.config.source} make {len(first)} clips of "
                f"{self.config.frames} latent frames",
                "give longer ones, so that there are at least two clips, or ask for fewer frames",
            )
        clips = chain(first, clips)
        while group := list(islice(clips, CLIPS_PER_SHARD)):
            yield partial(self._encode, group)

    def _clips(self, progress: Progress) -> Iterator[tuple[Tensor, str]]:
        """Yield the pixels (F, 3, H, W) and the prompt of each clip."""
        frames, *size = self.media.pixel_shape(self.config.frames, self.model.latent_size)
        for file, prompt in progress.track(self.prompts.items(), "encoding videos"):
            left = (fit_frame(frame, size) for frame in read_frames(file))
            while len(clip := list(islice(left, frames))) == frames:
                yield torch.stack(clip), prompt

    def _encode(self, group: list[tuple[Tensor, str]]) -> Tensors:
        pixels, prompts = zip(*group, strict=True)
        context = self.media.encode_prompts(list(prompts))
        return {"latents": self.media.encode(torch.stack(pixels)), "context": context}


def _own_prompts(config: DataConfig, media: Media) -> tuple[str, ...]:
    prompts = config.prompts or media.default_prompts
    if not prompts:
        raise ConfigError(
            "clips of the model's own need prompts", "name a file of them: --prompts FILE"
        )
    return prompts


def _prompt_of(video: Path, config: DataConfig) -> str:
    sidecar = video.with_suffix(".txt")
    if sidecar.is_file():
        return read_prompts(sidecar)[0]
    if len(config.prompts) == 1:
        return config.prompts[0]
    raise ConfigError(
        f"{video} has no prompt",
        f"write one into {sidecar.name} beside it, or give one for all videos by --prompts FILE",
    )


def _publish(partial_work: Path, folder: Path) -> None:
    try:
        os.replace(partial_work, folder)
    except OSError as error:
        raise OutputError(
            f"{folder} cannot be written: {error.strerror}",
            f"start again: finished shards are kept in {partial_work}",
        ) from error
