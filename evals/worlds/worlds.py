"""The two worlds by name: their models, their clips with truth, and scores of generated clips.

A scene is a true clip of a minute. A model continues the scene's first frames, and every frame that
it makes can be compared with the truth, because neither world knows chance after its first frames.

Shapes: B clips, F frames, C channels, n latent positions on a side, N pixels on a side.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple, Protocol

import torch
import typer
from torch import Tensor

from evals.worlds.photographs import (
    Path2D,
    PhotographClips,
    decode,
    encode,
    read_places,
    seen_before,
)
from vmla_convert.config import DataConfig
from vmla_convert.demo.judge import background_psnr, digit_coverage, read_digits
from vmla_convert.loading.load import DEMO
from vmla_convert.measuring.video import CAP_DB
from vmla_convert.media.clips import ClipSource, DemoClips
from vmla_convert.media.demo import DemoMedia
from vmla_convert.results import Metric

TEACHER = Path(__file__).parent / "teacher"
"""The model of the photograph world."""
UNITS = {
    Metric.DIGIT_ACCURACY: "share of frames",
    Metric.BACKGROUND_PSNR: "dB",
    Metric.REVISIT_PSNR: "dB",
    Metric.MOTION_ERROR: "pixels",
}


class Scene(NamedTuple):
    """True clips.

    Attributes:
        latents: (B, F, C, n, n).
        context: Prompts (B, text_len, text_dim).
        truth: (B, …) tensors of the world.
    """

    latents: Tensor
    context: Tensor
    truth: tuple[Tensor, ...]


Scores = dict[Metric, Tensor]
"""A figure of every frame after the given ones, (B, F − given)."""


class World(Protocol):
    """A world to measure in.

    Attributes:
        checkpoint: The dense model of the world.
        given_frames: True frames that a rollout begins with.
    """

    checkpoint: str
    given_frames: int

    def clips(self, frames: int, seed: int) -> ClipSource:
        """Clips to fit, train and measure on."""
        ...

    def scenes(self, count: int, frames: int) -> Scene:
        """Held-out scenes."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels (B, F, 3, N, N) of latents (B, F, C, n, n)."""
        ...

    def score(self, scene: Scene, latents: Tensor) -> Scores:
        """Compare generated latents, those of the given frames included, with the truth."""
        ...


class Digits:
    """A handwritten digit that bounces over a smooth background: the demo model's world."""

    checkpoint = DEMO
    given_frames = 10

    def clips(self, frames: int, seed: int) -> DemoClips:
        """Clips of the demo world."""
        return DemoClips(DataConfig("demo", frames, seed=seed))

    def scenes(self, count: int, frames: int) -> Scene:
        """Scenes with digit, background and coverage."""
        clips, media = self.clips(frames, 3).clips(0, count, "held_out"), DemoMedia()
        truth = (clips.labels, clips.background, clips.alpha)
        return Scene(media.encode(clips.video), media.encode_labels(clips.labels), truth)

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels of latents."""
        return DemoMedia().decode(latents)

    def score(self, scene: Scene, latents: Tensor) -> Scores:
        """The digit, the background and the digit's place."""
        labels, _, alpha = scene.truth
        video, given = self.decode(latents), self.given_frames
        psnr = background_psnr(video, given)[:, given:]
        made = video[:, given:]
        hits = (read_digits(made) == labels[:, None]).float()
        error = (_middle(digit_coverage(made)) - _middle(alpha[:, given : video.shape[1]])).norm(
            dim=-1
        )
        return {
            Metric.DIGIT_ACCURACY: hits,
            Metric.BACKGROUND_PSNR: psnr,
            Metric.MOTION_ERROR: error,
        }


class Photographs:
    """A camera over photographs that comes back to every place within the given frames."""

    checkpoint = str(TEACHER)
    given_frames = 48

    def clips(self, frames: int, seed: int) -> PhotographClips:
        """Clips of the photograph world."""
        return PhotographClips(frames, seed)

    def scenes(self, count: int, frames: int) -> Scene:
        """Scenes with the true pixels and the camera's path."""
        source = PhotographClips(frames, seed=3, return_within=self.given_frames)
        clips = source.clips(0, count, "held_out")
        return Scene(encode(clips.video, clips.path), clips.prompt, (clips.video, *clips.path))

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels of latents."""
        return decode(latents)

    def score(self, scene: Scene, latents: Tensor) -> Scores:
        """Pixels of places that the given frames showed, and the place that the model tells."""
        video, frames, given = scene.truth[0], latents.shape[1], self.given_frames
        path = Path2D(*(tensor[:, :frames] for tensor in scene.truth[1:]))
        known = seen_before(path, given)
        made = decode(latents[:, given:]).clamp(-1, 1)
        squared = (made - video[:, given:frames]).square().mean(2) * known
        error = squared.sum((2, 3)) / known.sum((2, 3))
        told, true = (read_places(each[:, given:frames]) for each in (latents, scene.latents))
        return {
            Metric.REVISIT_PSNR: (10 * torch.log10(4 / error)).clamp(max=CAP_DB),
            Metric.MOTION_ERROR: (told - true).norm(dim=-1).mean((2, 3)),
        }


def _middle(coverage: Tensor) -> Tensor:
    """Centre of mass (B, F, 2) of coverage (B, F, N, N); the frame's middle where it is empty."""
    at = torch.arange(coverage.shape[-1]) - (coverage.shape[-1] - 1) / 2
    mass = coverage.sum((2, 3)).clamp_min(1e-6)
    x, y = (coverage.sum(axis) @ at / mass for axis in (2, 3))
    return torch.stack([x, y], dim=-1)


WORLDS: dict[str, World] = {"digits": Digits(), "photographs": Photographs()}


def open_world(name: str) -> World:
    """The world of a name, for command lines."""
    if name not in WORLDS:
        raise typer.BadParameter(f"{name} is no world; choose {' or '.join(WORLDS)}")
    return WORLDS[name]
