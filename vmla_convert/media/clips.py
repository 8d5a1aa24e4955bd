"""Clips to train, calibrate and measure on.

A batch is a function of its seed and number alone, so a resumed run sees the same clips. B or N
clips, F frames, C channels.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import torch
from safetensors import SafetensorError
from torch import Tensor

from vmla_convert.checkpoint.hub import is_repo
from vmla_convert.config import DataConfig
from vmla_convert.demo.world import TRAIN_IMAGES, Clips, Split, digit_images, sample_clips
from vmla_convert.errors import ConfigError, NoClipsError
from vmla_convert.media.demo import DemoMedia
from vmla_convert.storage.limits import opened_safetensors

HELD_OUT_SHARE = 0.1
VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".gif")

SourceKind = Literal["demo", "self", "latents", "videos"]

_LAYOUT = (
    "store latents (N, F, C, height, width) and context (N, text_len, text_dim) as safetensors"
)
_ACCEPTED = (
    "give demo, a safetensors file or folder of latents and context or, to recover, self or videos "
    f"({' '.join(VIDEO_SUFFIXES)})"
)


class Batch(NamedTuple):
    """Clean latents (B, F, C, height, width) and their contexts (B, text_len, text_dim)."""

    latents: Tensor
    context: Tensor


class ClipSource(Protocol):
    """A source of batches."""

    def batch(self, index: int, size: int, split: Split = "train") -> Batch:
        """Return the batch with this number."""
        ...


class DemoClips:
    """Endless clips of the moving-digits world."""

    def __init__(self, config: DataConfig, sink_frames: int = 0) -> None:
        self.config = config
        self.sink_frames = sink_frames
        self.media = DemoMedia()

    def batch(self, index: int, size: int, split: Split = "train") -> Batch:
        """Return latents and contexts of `clips`."""
        clips = self.clips(index, size, split)
        return Batch(self.media.encode(clips.video), self.media.encode_labels(clips.labels))

    def clips(self, index: int, size: int, split: Split = "train") -> Clips:
        """Return a batch with pixels and labels; training clips may skip frames after the sink."""
        generator = seeded(self.config.seed, index, split)
        frames = self.config.frames
        times = torch.arange(frames).repeat(size, 1)
        if split == "train" and self.config.sink_gap:
            jumps = torch.rand(size, generator=generator) < 0.5
            gaps = torch.randint(self.config.sink_gap + 1, (size,), generator=generator)
            times[:, self.sink_frames :] += (gaps * jumps)[:, None]
        return sample_clips(size, frames, generator, split, times)

    def record(self) -> dict[str, Any]:
        """Return which images of digits each split draws from, as JSON data."""
        images = TRAIN_IMAGES + len(digit_images("held_out")[1])
        split = {"train": [0, TRAIN_IMAGES], "held_out": [TRAIN_IMAGES, images]}
        return {"source": "demo", "seed": self.config.seed, "images": images, **split}


class LatentClips:
    """Clips from safetensors files with `latents` and `context`; the last tenth is held out.

    Only headers and the clips of a batch are read, so the files need not fit in memory together.

    Raises:
        ConfigError: A file has another content, the files hold clips of different shapes, or there
            are fewer than two clips.
    """

    def __init__(self, config: DataConfig) -> None:
        self.seed = config.seed
        self.shards = [_read_header(file) for file in latent_files(Path(config.source))]
        first, *others = self.shards
        for shard in others:
            if shard.shapes != first.shapes:
                raise ConfigError(
                    f"{shard.file} holds clips of {shard.shapes}, {first.file.name} of "
                    f"{first.shapes}",
                    "keep clips of one shape in one folder",
                )
        self.starts = [0, *accumulate(shard.clips for shard in self.shards)]
        clips = self.starts.pop()
        if clips < 2:
            raise ConfigError(
                f"{config.source} holds {clips} clips",
                "store at least two: one to learn from, and one to measure on",
            )
        self.frames = min(config.frames, first.shapes[0][0])
        held_out = max(1, round(HELD_OUT_SHARE * clips))
        self.parts: dict[Split, range] = {
            "train": range(clips - held_out),
            "held_out": range(clips - held_out, clips),
        }

    def batch(self, index: int, size: int, split: Split = "train") -> Batch:
        """Return clips drawn with replacement from one part of the files."""
        part = self.parts[split]
        generator = seeded(self.seed, index, split)
        picks = torch.randint(part.start, part.stop, (size,), generator=generator)
        latents, context = zip(*(self._read(pick) for pick in picks.tolist()), strict=True)
        return Batch(torch.stack(latents), torch.stack(context))

    def record(self) -> dict[str, Any]:
        """Return the clips of each split, and the files' names and hash, as JSON data."""
        parts = {split: [part.start, part.stop] for split, part in self.parts.items()}
        files = [shard.file for shard in self.shards]
        names, sha256 = [file.name for file in files], hash_files(files)
        return {"clips": self.parts["held_out"].stop, **parts, "files": names, "sha256": sha256}

    def _read(self, clip: int) -> tuple[Tensor, Tensor]:
        """Read one clip: latents (F, C, height, width) and context (text_len, text_dim)."""
        shard = bisect_right(self.starts, clip) - 1
        row = clip - self.starts[shard]
        # Opened for each clip, because the pages of a memory map stay resident until it is closed.
        with _opened(self.shards[shard].file) as tensors:
            latents = tensors.get_slice("latents")[row : row + 1, : self.frames]
            context = tensors.get_slice("context")[row : row + 1]
        return latents[0].float(), context[0].float()


class _Shard(NamedTuple):
    """One file of clips.

    Attributes:
        file: Path of the file.
        clips: Number of clips in it.
        shapes: Shape of a clip's latents, then of its context.
    """

    file: Path
    clips: int
    shapes: tuple[list[int], list[int]]


def _read_header(file: Path) -> _Shard:
    with _opened(file) as tensors:
        if not {"latents", "context"} <= set(tensors.keys()):
            raise ConfigError(f"{file} has no tensors named 'latents' and 'context'", _LAYOUT)
        shapes = (tensors.get_slice(name).get_shape() for name in ("latents", "context"))
        latents, context = map(list, shapes)
    if len(latents) != 5 or len(context) != 3:
        raise ConfigError(f"{file} has latents of {latents} and contexts of {context}", _LAYOUT)
    if latents[0] != context[0]:
        raise ConfigError(
            f"{file} has {latents[0]} latents for {context[0]} contexts",
            "store one context for each clip",
        )
    return _Shard(file, latents[0], (latents[1:], context[1:]))


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with opened_safetensors(file) as tensors:
            yield tensors
    except SafetensorError as error:
        raise ConfigError(f"{file} is no safetensors file: {error}", _LAYOUT) from error
    except OSError as error:
        raise ConfigError(
            f"{file} cannot be read: {error.strerror or error}", "put it back, or name other clips"
        ) from error
    except RuntimeError as error:  # from torch, which could not map the file
        raise ConfigError(
            f"{file} is larger than this machine's memory can map",
            "store the clips as several files in one folder",
        ) from error


def hash_files(files: Sequence[Path]) -> str:
    """Return the SHA-256, in hex, of the bytes of all files in turn."""
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()


def source_kind(source: str) -> SourceKind:
    """Return the kind of a source: `demo`, `self`, or what the files at a path hold.

    Raises:
        NoClipsError: The path holds no clips.
        ConfigError: The path holds latents and videos.
    """
    if source in ("demo", "self"):
        return source
    path = Path(source)
    latents, videos = latent_files(path), video_files(path)
    if not (latents or videos):
        raise NoClipsError(f"no clips at {path}", _ACCEPTED)
    if latents and videos:
        raise ConfigError(f"{path} holds latents and videos", "keep them in folders of their own")
    return "latents" if latents else "videos"


def latent_files(path: Path) -> list[Path]:
    """Return the safetensors files of a folder, sorted, or the one file that a path names."""
    if path.is_dir():
        return sorted(file for file in path.glob("*.safetensors") if not file.name.startswith("."))
    return [path] if path.is_file() and not _is_video(path) else []


def video_files(path: Path) -> list[Path]:
    """Return the videos anywhere in a folder, sorted, or the one file that a path names."""
    if path.is_dir():
        found = (file for file in path.rglob("*") if _is_video(file) and file.is_file())
        return sorted(file for file in found if not _is_hidden(file.relative_to(path)))
    return [path] if path.is_file() and _is_video(path) else []


def _is_video(file: Path) -> bool:
    return file.suffix.lower() in VIDEO_SUFFIXES


def _is_hidden(file: Path) -> bool:
    """Recognise hidden files; macOS leaves some on foreign disks, with the videos' own ending."""
    return any(part.startswith(".") for part in file.parts)


def open_clips(config: DataConfig, sink_frames: int = 0) -> DemoClips | LatentClips:
    """Open the source that a config names.

    Raises:
        ConfigError: The source is missing, or `prepare_clips` must make latents first.
    """
    kind = source_kind(config.source)
    if kind == "demo":
        return DemoClips(config, sink_frames)
    if kind != "latents":
        what = "the dense model's own samples" if kind == "self" else f"videos ({config.source})"
        raise ConfigError(
            f"only recovery can make clips of {what}",
            "here --data takes demo, or a safetensors file or folder of latents and context",
        )
    return LatentClips(config)


def recorded(config: DataConfig) -> DataConfig:
    """Return the config for a record: a local `base` becomes absolute, unlike any Hub id."""
    base = config.base
    if base is None or (is_repo(base) and not Path(base).exists()):
        return config
    return replace(config, base=str(Path(base).absolute()))


def open_openings(config: DataConfig, chunk_frames: int) -> ClipSource:
    """Open clips of one chunk, with a seed that differs from the long clips' seed."""
    return open_clips(DataConfig(config.source, chunk_frames, seed=config.seed + 1))


def seeded(seed: int, index: int, stream: str) -> torch.Generator:
    """Return an independent generator for each (seed, index, stream)."""
    name = f"{seed}/{index}/{stream}".encode()
    # FNV-1a: a stable 64-bit hash, unlike Python's own, which changes with each process.
    state = 0xCBF29CE484222325
    for byte in name:
        state = (state ^ byte) * 0x100000001B3 % 2**64
    return torch.Generator().manual_seed(state % 2**63)
