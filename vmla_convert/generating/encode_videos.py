"""Clips that are encoded from video files.

F frames of height H and width W.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vmla_convert.config import DataConfig, ModelConfig
from vmla_convert.errors import ConfigError, OutputError
from vmla_convert.generating.clip_sets import set_folder
from vmla_convert.media.base import Media
from vmla_convert.media.clips import video_files
from vmla_convert.media.open import check_prompts
from vmla_convert.media.prompts import EncodedPrompts, read_prompts
from vmla_convert.media.video import check_playable, fit_frame, read_frames
from vmla_convert.progress import Progress
from vmla_convert.storage.output import partial_folder
from vmla_convert.storage.tensor_store import FolderStore, Tensors

FORMAT = 1
CLIPS_PER_SHARD = 8


@dataclass
class EncodedVideos:
    """Consecutive clips of video files, without the frames at a file's end that fill no clip.

    Attributes:
        data: Frames, latent size and number of clips.
        model: Configuration of the model that the clips are for.
        root: Folder of all sets of clips.
        parts: Text encoder and VAE that encode, as JSON data.
        prompts: The prompt of each file.
    """

    data: DataConfig
    model: ModelConfig
    root: Path
    parts: Any
    prompts: dict[Path, str]
    _text: EncodedPrompts | None = field(default=None, init=False)

    @classmethod
    def find(cls, data: DataConfig, model: ModelConfig, root: Path, parts: Any) -> EncodedVideos:
        """Find the videos and their prompts.

        Raises:
            ConfigError: A video has no prompt.
        """
        files = video_files(Path(data.source))
        return cls(data, model, root, parts, {file: _prompt_of(file, data) for file in files})

    @property
    def clips(self) -> int | None:
        """Number of clips at most; None for all that the files hold."""
        return self.data.clips

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Everything that the clips depend on; sizes and times stand for the files' contents."""
        root = Path(self.data.source)
        root = root if root.is_dir() else root.parent
        stats = [(file, file.stat(), prompt) for file, prompt in self.prompts.items()]
        return {
            "format": FORMAT,
            "kind": "videos",
            "frames": self.data.frames,
            "clips": self.clips,
            "latent_size": self._latent_size,
            "parts": [self.parts, self.model.geometry.in_dim, self.model.geometry.text_dim],
            "videos": [
                [file.relative_to(root).as_posix(), stat.st_size, stat.st_mtime_ns, prompt]
                for file, stat, prompt in stats
            ],
        }

    @cached_property
    def folder(self) -> Path:
        """Folder of this set, named by the hash of its identity."""
        return set_folder(self.root, self.identity)

    def ready(self) -> DataConfig:
        """The clips as latents."""
        return replace(self.data, source=str(self.folder))

    def is_done(self) -> bool:
        """Whether all clips are there."""
        return self.folder.is_dir()

    def check(self) -> None:
        """Refuse unknown prompts and files that cannot be opened, without decoding."""
        check_prompts(self.model, self.prompts.values())
        for file in self.prompts:
            check_playable(file)

    def nbytes(self) -> int:
        """0, because the length of a video is known only when all of it was decoded."""
        return 0

    def encode_prompts(self, media: Media, progress: Progress) -> None:
        """Encode the prompts of all files."""
        self._text = EncodedPrompts(media, self.prompts.values(), progress)

    def make(self, media: Media, progress: Progress) -> None:
        """Encode the clips; the folder appears when it is complete.

        Resumed work decodes all files again to find where the clips lie. Encoding, which takes
        much longer, is not repeated.

        Raises:
            ConfigError: A file cannot be read, or the files make fewer than two clips.
        """
        if self.is_done():  # by another process meanwhile
            return
        store = FolderStore(partial_folder(self.folder), self.identity)
        clips = islice(self._clips(media, progress), self.clips)
        first = list(islice(clips, 2))
        if len(first) < 2:
            raise ConfigError(
                f"the videos at {self.data.source} make {len(first)} clips of "
                f"{self.data.frames} latent frames",
                "give longer ones, so that there are at least two clips, or ask for fewer frames",
            )
        clips = chain(first, clips)
        for shard, group in enumerate(iter(lambda: list(islice(clips, CLIPS_PER_SHARD)), [])):
            if not store.has(name := f"clips-{shard:05d}"):
                store.put(name, self._encode(group, media))
        _publish(store.folder, self.folder)

    @property
    def _latent_size(self) -> tuple[int, int]:
        return self.data.latent_size or self.model.latent_size

    def _clips(self, media: Media, progress: Progress) -> Iterator[tuple[Tensor, str]]:
        """Yield the pixels (F, 3, H, W) and the prompt of each clip."""
        assert self.data.frames is not None
        frames, *size = media.pixel_shape(self.data.frames, self._latent_size)
        for file, prompt in progress.track(self.prompts.items(), "encoding videos"):
            left = (fit_frame(frame, size) for frame in read_frames(file))
            while len(clip := list(islice(left, frames))) == frames:
                yield torch.stack(clip), prompt

    def _encode(self, group: list[tuple[Tensor, str]], media: Media) -> Tensors:
        assert self._text is not None
        pixels, prompts = zip(*group, strict=True)
        context = self._text.encode_prompts(list(prompts))
        return {"latents": media.encode(torch.stack(pixels)), "context": context}


def _prompt_of(video: Path, data: DataConfig) -> str:
    sidecar = video.with_suffix(".txt")
    if sidecar.is_file():
        return read_prompts(sidecar)[0]
    if len(data.prompts) == 1:
        return data.prompts[0]
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
