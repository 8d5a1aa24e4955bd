"""Clips to train, calibrate and measure on.

A batch is a function of its seed and its place in the sequence of clips alone, so a resumed run
sees the same clips. B or N clips, F frames, C channels.
"""

from __future__ import annotations

import hashlib
import json
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

from vmla_convert.config import DataConfig, ModelConfig
from vmla_convert.demo.world import TRAIN_IMAGES, Clips, Split, digit_images, sample_clips
from vmla_convert.errors import ConfigError, NoClipsError
from vmla_convert.media.demo import DemoMedia, require_demo_media
from vmla_convert.storage.limits import opened_safetensors
from vmla_convert.storage.output import IDENTITY_NAME

HELD_OUT_SHARE = 0.1
DEMO_FRAMES = 10
VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".gif")

SourceKind = Literal["demo", "self", "latents", "videos"]

_LAYOUT = (
    "store latents (N, F, C, height, width) and context (N, text_len, text_dim) as safetensors"
)
_ACCEPTED = (
    "give self, demo, a safetensors file or folder of latents and context, or videos "
    f"({' '.join(VIDEO_SUFFIXES)})"
)


class Batch(NamedTuple):
    """Clean latents (B, F, C, height, width) and their contexts (B, text_len, text_dim)."""

    latents: Tensor
    context: Tensor


class ClipSource(Protocol):
    """An endless sequence of clips for each split."""

    def batch(self, start: int, size: int, split: Split = "train") -> Batch:
        """Return `size` clips of the sequence, from number `start` on.

        `start` is a multiple of `size`, but for a last batch that is smaller.
        """
        ...


class DemoClips:
    """Endless clips of the moving-digits world."""

    def __init__(self, config: DataConfig, sink_frames: int = 0) -> None:
        self.config, self.frames = config, config.frames or DEMO_FRAMES
        self.sink_frames = sink_frames
        self.media = DemoMedia()

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the latents of a clip, (F, C, height, width)."""
        return tuple(self.batch(0, 1).latents.shape[1:])

    def batch(self, start: int, size: int, split: Split = "train") -> Batch:
        """Return latents and contexts of `clips`, seeded by the number of the batch."""
        clips = self.clips(start // size, size, split)
        return Batch(self.media.encode(clips.video), self.media.encode_labels(clips.labels))

    def clips(self, index: int, size: int, split: Split = "train") -> Clips:
        """Return a batch with pixels and labels; training clips may skip frames after the sink."""
        generator = seeded(self.config.seed, index, split)
        times = torch.arange(self.frames).repeat(size, 1)
        if split == "train" and self.config.sink_gap:
            jumps = torch.rand(size, generator=generator) < 0.5
            gaps = torch.randint(self.config.sink_gap + 1, (size,), generator=generator)
            times[:, self.sink_frames :] += (gaps * jumps)[:, None]
        return sample_clips(size, self.frames, generator, split, times)

    def record(self) -> dict[str, Any]:
        """Return which images of digits each split draws from, as JSON data."""
        images = TRAIN_IMAGES + len(digit_images("held_out")[1])
        split = {"train": [0, TRAIN_IMAGES], "held_out": [TRAIN_IMAGES, images]}
        return {"source": "demo", "seed": self.config.seed, "images": images, **split}


class LatentClips:
    """Clips from safetensors files with `latents` and `context`; the last tenth is held out.

    A folder of clips that this package made says which split its clips are for. Only headers and
    the clips of a batch are read, so the files need not fit in memory together.

    Raises:
        ConfigError: A file has another content, the files hold clips of different shapes, or there
            are fewer than two clips.
    """

    def __init__(self, config: DataConfig) -> None:
        self.config = config
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
        stored, self.made = self.starts.pop(), identity_of(Path(config.source))
        made = self.made.get("split")
        if made is None and stored < 2:
            raise ConfigError(
                f"{config.source} holds {stored} clips",
                "store at least two: one to learn from, and one to measure on",
            )
        self.frames = min(config.frames or first.shapes[0][0], first.shapes[0][0])
        self.parts = _parts(stored, config.clips or stored, made)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the latents of a clip, (F, C, height, width)."""
        return (self.frames, *self.shards[0].shapes[0][1:])

    def batch(self, start: int, size: int, split: Split = "train") -> Batch:
        """Return clips of one split, which come in a new order each time all of them were used."""
        part = self.parts[split]
        clips = [
            part[self._pick(number, len(part), split)] for number in range(start, start + size)
        ]
        latents, context = zip(*map(self._read, clips), strict=True)
        return Batch(torch.stack(latents), torch.stack(context))

    def _pick(self, number: int, clips: int, split: Split) -> int:
        turn, place = divmod(number, clips)
        order = torch.randperm(clips, generator=seeded(self.config.seed, turn, split))
        return int(order[place])

    def record(self) -> dict[str, Any]:
        """Return the clips of each split, and how they were made or their hash, as JSON data."""
        parts = {split: [part.start, part.stop] for split, part in self.parts.items() if part}
        used = max(part.stop for part in self.parts.values())
        shards = zip(self.shards, self.starts, strict=True)
        files = [shard.file for shard, start in shards if start < used]
        names, sha256 = [file.name for file in files], hash_files(files)
        made = {name: self.made[name] for name in ("kind", "seed", "prompts") if name in self.made}
        return {"clips": used, **parts, **made, "files": names, "sha256": sha256}

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


def settled(config: DataConfig, model: ModelConfig) -> DataConfig:
    """Decide the source and the length of clips where a config leaves them to the model.

    Raises:
        ConfigError: Clips of the demo world for a model of another world.
        NoClipsError: A path holds no clips.
    """
    source = config.source
    if source == "auto":
        source = "demo" if model.media == "demo" else "self"
    if source_kind(source) == "demo":
        require_demo_media(model, "the source of clips 'demo'")
    chunk = model.chunk_frames
    whole_chunks = max(2, model.cache.window_frames // chunk) * chunk
    return replace(config, source=source, frames=config.frames or whole_chunks)


def open_clips(config: DataConfig, sink_frames: int = 0) -> DemoClips | LatentClips:
    """Open clips of the demo world, or latents; `ready_clips` makes these of every other source.

    Raises:
        ConfigError: The files do not hold clips.
        NoClipsError: The path holds no clips.
    """
    kind = source_kind(config.source)
    assert kind in ("demo", "latents"), f"{kind} clips must be made first"
    return DemoClips(config, sink_frames) if kind == "demo" else LatentClips(config)


def identity_of(folder: Path) -> dict[str, Any]:
    """How the clips in a folder were made; empty for clips that were not made by this package."""
    try:
        return dict(json.loads((folder / IDENTITY_NAME).read_text("utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def _parts(stored: int, used: int, made: Split | None) -> dict[Split, range]:
    """Numbers of the clips of each split, where `used` of the clips in the files are used."""
    used = min(used, stored)
    if made == "held_out":
        return {"held_out": range(used)}
    held_out = held_out_clips(used)
    if made == "train":
        return {"train": range(used), "held_out": range(used, min(stored, used + held_out))}
    return {"train": range(used - held_out), "held_out": range(used - held_out, used)}


def held_out_clips(clips: int) -> int:
    """Number of clips that are held out beside, or of, a number of training clips."""
    return max(1, round(HELD_OUT_SHARE * clips))


def open_openings(config: DataConfig, chunk_frames: int) -> ClipSource:
    """Open clips of one chunk, with a seed that differs from the long clips' seed."""
    return open_clips(replace(config, frames=chunk_frames, sink_gap=0, seed=config.seed + 1))


def seeded(seed: int, index: int, stream: str) -> torch.Generator:
    """Return an independent generator for each (seed, index, stream)."""
    name = f"{seed}/{index}/{stream}".encode()
    # FNV-1a: a stable 64-bit hash, unlike Python's own, which changes with each process.
    state = 0xCBF29CE484222325
    for byte in name:
        state = (state ^ byte) * 0x100000001B3 % 2**64
    return torch.Generator().manual_seed(state % 2**63)
