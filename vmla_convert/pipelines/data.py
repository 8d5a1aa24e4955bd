"""Clips to train, calibrate and measure on: pure functions of (seed, index), so resume is exact."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from vmla_convert.config import DataConfig
from vmla_convert.demo.world import Clips, Split, sample_clips
from vmla_convert.errors import ConfigError
from vmla_convert.pipelines.codecs import DemoCodec

HELD_OUT_SHARE = 0.1


class Batch(NamedTuple):
    """Clean latents (B, F, C, height, width) and their prompts (B, text_len, text_dim)."""

    latents: Tensor
    context: Tensor


class ClipSource(Protocol):
    """Where batches come from."""

    def batch(self, index: int, size: int, split: Split = "train") -> Batch:
        """The batch of a given number; the same number gives the same clips."""
        ...


class DemoClips:
    """Clips of the moving-digits world, endless."""

    def __init__(self, config: DataConfig, sink_frames: int = 0) -> None:
        self.config = config
        self.sink_frames = sink_frames
        self.codec = DemoCodec()

    def batch(self, index: int, size: int, split: Split = "train") -> Batch:
        """Clips of one batch; training clips may jump in time after the sink."""
        clips = self.clips(index, size, split)
        return Batch(self.codec.encode(clips.video), self.codec.encode_labels(clips.labels))

    def clips(self, index: int, size: int, split: Split = "train") -> Clips:
        """The same with pixels and truth."""
        generator = seeded(self.config.seed, index, split)
        frames = self.config.frames
        times = torch.arange(frames).repeat(size, 1)
        if split == "train" and self.config.sink_gap:
            jumps = torch.rand(size, generator=generator) < 0.5
            gaps = torch.randint(self.config.sink_gap + 1, (size,), generator=generator)
            times[:, self.sink_frames :] += (gaps * jumps)[:, None]
        return sample_clips(size, frames, generator, split, times)


class LatentFile:
    """Clips from a safetensors file with `latents` and `context`; the last tenth is held out."""

    def __init__(self, config: DataConfig) -> None:
        path = Path(config.source)
        if not path.is_file():
            raise ConfigError(
                f"no latent file at {path}", "use --data demo, or a safetensors file of latents"
            )
        try:
            tensors = load_file(path)
        except SafetensorError as error:
            raise ConfigError(f"{path} is no safetensors file: {error}") from error
        if not {"latents", "context"} <= tensors.keys():
            raise ConfigError(f"{path} has no tensors named 'latents' and 'context'")
        self.seed = config.seed
        self.latents = tensors["latents"][:, : config.frames].float()
        self.context = tensors["context"].float()
        if len(self.latents) < 2 or len(self.latents) != len(self.context):
            raise ConfigError(
                f"{path} has {len(self.latents)} latents for {len(self.context)} contexts",
                "store one context for each clip, and at least two clips",
            )
        held_out = max(1, round(HELD_OUT_SHARE * len(self.latents)))
        self.parts: dict[Split, range] = {
            "train": range(len(self.latents) - held_out),
            "held_out": range(len(self.latents) - held_out, len(self.latents)),
        }

    def batch(self, index: int, size: int, split: Split = "train") -> Batch:
        """Clips drawn with replacement from one part of the file."""
        part = self.parts[split]
        generator = seeded(self.seed, index, split)
        picks = torch.randint(part.start, part.stop, (size,), generator=generator)
        return Batch(self.latents[picks], self.context[picks])


def open_clips(config: DataConfig, sink_frames: int = 0) -> ClipSource:
    """The source that a config names."""
    if config.source == "demo":
        return DemoClips(config, sink_frames)
    return LatentFile(config)


def open_openings(config: DataConfig, chunk_frames: int) -> ClipSource:
    """Clips of one chunk; another seed, so that they are not the openings of the long clips."""
    return open_clips(DataConfig(config.source, chunk_frames, seed=config.seed + 1))


def seeded(seed: int, index: int, stream: str) -> torch.Generator:
    """An independent generator for (seed, index, stream)."""
    name = f"{seed}/{index}/{stream}".encode()
    # FNV-1a: a stable 64-bit hash, unlike Python's own, which changes with each process.
    state = 0xCBF29CE484222325
    for byte in name:
        state = (state ^ byte) * 0x100000001B3 % 2**64
    return torch.Generator().manual_seed(state % 2**63)
