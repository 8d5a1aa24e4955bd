"""Turn what needs a model into latents, once: the dense model's own samples, and video files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count, cycle, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vmla_convert import __version__
from vmla_convert.checkpoint.output import partial_folder
from vmla_convert.checkpoint.tensor_store import FolderStore, Tensors
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
from vmla_convert.tables import to_dict

CLIPS_PER_SHARD = 8
# Of all clips that are sampled together; Wan 1.3B takes about 6 GiB for one of 21 frames.
CACHE_BYTES_AT_ONCE = 8 << 30


def prepare_clips(
    config: DataConfig,
    dense: CausalWanModel,
    folder: Path,
    origin: Any,
    progress: Progress | None = None,
    media: Media | None = None,
) -> DataConfig:
    """Turn clips that need a model into latents on disk; what is latents already stays as it is.

    Work that was interrupted lies in `<folder>.partial/`, and the same call goes on with it. Where
    several processes train, one prepares.

    Args:
        config: The clips wanted.
        dense: Whose samples `self` are, and whose media reads videos.
        folder: For the latents, as shards of `latents` and `context`; appears when it is complete.
            One that holds these very clips is used again.
        origin: What tells the dense model's weights from others, JSON-able, such as the `source` of
            a conversion's record.
        progress: Where to draw.
        media: That encodes; by default the model's own, opened anew.

    Returns:
        The config of the same clips as latents.

    Raises:
        CheckpointError: The model's text encoder and VAE are not there.
        ConfigError: There are no clips, they are too few, a video cannot be read or has no prompt,
            or no text encoder and VAE are known for the model.
        MissingExtraError: Videos cannot be read without PyAV, nor encoded without the extra [wan].
        OutputError: The folder holds something else, or cannot be written.
        VmlaError: The model's text encoder cannot read a prompt.
    """
    kind = source_kind(config.source)
    if kind in ("demo", "latents"):
        return config
    device = dense.patch_embedding.weight.device
    media = media or open_media(dense.config, MediaConfig(config.base), device=device)
    if kind == "self":
        work = _OwnSamples.planned(config, dense, media, origin)
    else:
        work = _Videos.planned(config, dense.config, media)
    done = folder.exists()
    # The shelf refuses a folder of other work.
    shelf = FolderStore(folder if done else partial_folder(folder), work.identity())
    if not done:
        work.fill(shelf, progress or Silent())
        _publish(shelf.folder, folder)
    return replace(config, source=str(folder))


def check_makeable(config: DataConfig, model: ModelConfig, media: Media) -> None:
    """Refuse, before a model is read, clips that `prepare_clips` could not make.

    Raises:
        ConfigError: A prompt is missing, or a video is damaged so that it shows at once.
        MissingExtraError: Videos cannot be read without PyAV.
        VmlaError: The model's text encoder cannot read a prompt.
    """
    if source_kind(config.source) == "self":
        check_prompts(model, _own_prompts(config, media))
    elif source_kind(config.source) == "videos":
        _Videos.planned(config, model, media).check()


@dataclass(frozen=True)
class _OwnSamples:
    """The dense model's rollouts, prompt after prompt and round again."""

    config: DataConfig
    dense: CausalWanModel
    media: Media
    origin: Any
    prompts: tuple[str, ...]

    @classmethod
    def planned(
        cls, config: DataConfig, dense: CausalWanModel, media: Media, origin: Any
    ) -> _OwnSamples:
        """Find out what to sample."""
        return cls(config, dense, media, origin, _own_prompts(config, media))

    def identity(self) -> Any:
        """What the latents depend on."""
        config = self.config
        how = [config.frames, config.clips, config.seed, self.prompts, self.media.name]
        return [__version__, how, to_dict(self.dense.config), self.origin]

    def fill(self, shelf: FolderStore, progress: Progress) -> None:
        """Sample every shard that is not there."""
        check_prompts(self.dense.config, self.prompts)
        prompts = list(islice(cycle(self.prompts), self.config.clips))
        size = self._clips_at_once()
        batches = [prompts[start : start + size] for start in range(0, len(prompts), size)]
        for index, batch in enumerate(progress.track(batches, "sampling clips")):
            if not shelf.has(name := _shard_name(index)):
                shelf.put(name, self._sampled(batch, index))

    def _sampled(self, prompts: list[str], index: int) -> Tensors:
        """One shard, from noise of its own: whatever was sampled before, it comes out the same."""
        seed = seeded(self.config.seed, index, "self").initial_seed()
        frames, text = self.config.frames, self.media
        chunks = list(generate(self.dense, prompts, frames, seed, text=text))
        # In the model's own dtype: that is exact, and what bf16 models make takes half the space.
        latents = torch.cat(chunks, dim=1).cpu()
        return {"latents": latents, "context": self.media.encode_prompts(prompts)}

    def _clips_at_once(self) -> int:
        """By what their caches take and not by what is free, as the samples depend on it."""
        model = self.dense.config
        each = model.cache_bytes(model.cache.window_frames)
        return max(1, min(CLIPS_PER_SHARD, CACHE_BYTES_AT_ONCE // each))


@dataclass(frozen=True)
class _Videos:
    """Consecutive clips of every file, frames as they come; what is left of a file is dropped."""

    config: DataConfig
    model: ModelConfig
    media: Media
    prompts: dict[Path, str]

    @classmethod
    def planned(cls, config: DataConfig, model: ModelConfig, media: Media) -> _Videos:
        """Find out what to encode."""
        files = video_files(Path(config.source))
        return cls(config, model, media, {file: _prompt_of(file, config) for file in files})

    def identity(self) -> Any:
        """What the latents depend on; of the files what a glance tells, they may be large."""
        root = Path(self.config.source)
        root = root if root.is_dir() else root.parent
        stats = [(file, file.stat(), prompt) for file, prompt in self.prompts.items()]
        videos = [
            [file.relative_to(root).as_posix(), told.st_size, told.st_mtime_ns, prompt]
            for file, told, prompt in stats
        ]
        how = [self.media.name, self.model.latent_size, self.config.frames]
        return [__version__, how, videos]

    def fill(self, shelf: FolderStore, progress: Progress) -> None:
        """Encode every shard that is not there.

        A second start decodes again what it has: where a clip lies in its file is known by no other
        way, and encoding is what takes long.
        """
        self.check()
        clips = self._clips(progress)
        for index in count():
            group = list(islice(clips, CLIPS_PER_SHARD))
            if index == 0 and len(group) < 2:
                raise ConfigError(
                    f"the videos at {self.config.source} make {len(group)} clips of "
                    f"{self.config.frames} latent frames",
                    "give longer ones, so that there are at least two clips, or ask for fewer "
                    "frames",
                )
            if not group:
                return
            if not shelf.has(name := _shard_name(index)):
                shelf.put(name, self._encoded(group))

    def check(self) -> None:
        """Refuse what shows without decoding anything."""
        check_prompts(self.model, self.prompts.values())
        for file in self.prompts:
            check_playable(file)

    def _clips(self, progress: Progress) -> Iterator[tuple[Tensor, str]]:
        """Pixels (F, 3, H, W) of each clip, and its prompt."""
        frames, *size = self.media.pixel_shape(self.config.frames, self.model.latent_size)
        for file, prompt in progress.track(self.prompts.items(), "encoding videos"):
            left = (fit_frame(frame, size) for frame in read_frames(file))
            while len(clip := list(islice(left, frames))) == frames:
                yield torch.stack(clip), prompt

    def _encoded(self, group: list[tuple[Tensor, str]]) -> Tensors:
        latents = self.media.encode(torch.stack([pixels for pixels, _ in group]))
        return {
            "latents": latents,
            "context": self.media.encode_prompts([prompt for _, prompt in group]),
        }


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


def _shard_name(index: int) -> str:
    return f"clips-{index:05d}"


def _publish(partial: Path, folder: Path) -> None:
    try:
        os.replace(partial, folder)
    except OSError as error:
        raise OutputError(
            f"{folder} cannot be written: {error.strerror}",
            f"start again: what is done is kept in {partial}",
        ) from error
