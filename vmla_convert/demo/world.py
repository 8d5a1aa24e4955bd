"""The demo world: one handwritten digit that bounces over a smooth textured background.

Clips are small RGB videos with known truth. The prompt names the digit. The background, the digit's
shape and its colour are random and known from past frames only, so a model of this world must use
its cache. Images are scikit-learn's 8x8 digits, split by image into train and held-out.

Shapes: B clips, F frames, N images.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vmla_convert.errors import MissingExtraError

Split = Literal["train", "held_out"]

FRAME_SIZE = 24
DIGIT_SIZE = 18
FIELD_CELLS = 4
# Darker than any digit: the strongest channel of a digit is 1, the weakest is above −0.2.
FIELD_MEAN, FIELD_MAX = -0.55, 0.0
TRAIN_IMAGES = 1500


class Clips(NamedTuple):
    """A batch of clips with their truth; pixels in −1 … 1.

    Attributes:
        video: (B, F, 3, size, size).
        labels: The digit (B,).
        background: The background without the digit (B, 3, size, size).
        alpha: The digit's coverage of each pixel (B, F, size, size), 0 … 1.
    """

    video: Tensor
    labels: Tensor
    background: Tensor
    alpha: Tensor


@cache
def digit_images(split: Split) -> tuple[Tensor, Tensor]:
    """Images (N, 8, 8) in 0 … 1 and labels (N,) of one split.

    Raises:
        MissingExtraError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingExtraError("the demo world", "demo") from error
    digits: Any = load_digits()
    part = slice(None, TRAIN_IMAGES) if split == "train" else slice(TRAIN_IMAGES, None)
    images = torch.tensor(digits.images[part], dtype=torch.float32) / 16
    return images, torch.tensor(digits.target[part])


def sample_clips(
    batch: int,
    frames: int,
    generator: torch.Generator,
    split: Split = "train",
    times: Tensor | None = None,
) -> Clips:
    """Draw random clips.

    Args:
        batch: Number of clips.
        frames: Number of frames.
        generator: Source of all randomness.
        split: Split of the digit images.
        times: Moment that each frame shows (B, F); None for 0, 1, 2, …
    """
    images, labels = digit_images(split)
    index = torch.randint(len(images), (batch,), generator=generator)
    background = _background(batch, generator)
    colour = torch.rand(batch, 3, generator=generator) + 0.8
    colour = 2 * colour / colour.amax(1, keepdim=True) - 1
    if times is None:
        times = torch.arange(frames).expand(batch, frames)
    alpha = _draw(images[index], _bounce(times.float(), generator))
    cover = alpha[:, :, None]
    video = background[:, None] * (1 - cover) + colour[:, None, :, None, None] * cover
    return Clips(video, labels[index], background, alpha)


def _background(batch: int, generator: torch.Generator) -> Tensor:
    """A random smooth field of dark colours (B, 3, size, size)."""
    coarse = torch.rand(batch, 3, FIELD_CELLS, FIELD_CELLS, generator=generator) - 0.5
    coarse = 0.7 * coarse + FIELD_MEAN
    field = F.interpolate(coarse, size=(FRAME_SIZE, FRAME_SIZE), mode="bicubic")
    return field.clamp(-1, FIELD_MAX)


def _bounce(times: Tensor, generator: torch.Generator) -> Tensor:
    """Top-left corners (B, F, 2) of a digit that moves straight and reflects at the borders."""
    batch, room = len(times), FRAME_SIZE - DIGIT_SIZE
    start = torch.rand(batch, 2, generator=generator) * room
    angle = torch.rand(batch, generator=generator) * 2 * torch.pi
    speed = 0.5 + torch.rand(batch, generator=generator)
    velocity = torch.stack([angle.cos(), angle.sin()], dim=1) * speed[:, None]
    unfolded = (start[:, None] + velocity[:, None] * times[:, :, None]).remainder(2 * room)
    return torch.where(unfolded > room, 2 * room - unfolded, unfolded)


def _draw(images: Tensor, corners: Tensor) -> Tensor:
    """Coverage (B, F, size, size) of the digit images (B, 8, 8) at sub-pixel corners (B, F, 2)."""
    batch, frames = corners.shape[:2]
    size = (DIGIT_SIZE, DIGIT_SIZE)
    large = F.interpolate(images[:, None], size=size, mode="bilinear", align_corners=False)
    large = large[:, None].expand(-1, frames, -1, -1, -1).flatten(0, 1)
    pixels = torch.arange(FRAME_SIZE, dtype=torch.float32)
    # Coordinates of each pixel on the digit's image, in grid_sample's −1 … 1.
    y, x = ((pixels - corners[..., [i]] + 0.5) / DIGIT_SIZE * 2 - 1 for i in range(2))
    shape = (batch, frames, FRAME_SIZE, FRAME_SIZE)
    grid = torch.stack([x[..., None, :].expand(shape), y[..., :, None].expand(shape)], dim=-1)
    drawn = F.grid_sample(large, grid.flatten(0, 1), align_corners=False)
    return drawn.view(shape)
