"""The demo world's judge: scores generated clips, which have no known truth.

The judge answers two questions. Which digit does a frame show? Does the background stay that of the
clip's first frames? Both answers start from the digit's coverage of each pixel, which inverts the
world's rendering: a bright digit of one colour, mixed over a smooth dark background.

Shapes: B clips, F frames, N images, H height, W width.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from vmla_convert.demo.world import DIGIT_SIZE, FIELD_CELLS, FIELD_MAX, FIELD_MEAN, sample_clips
from vmla_convert.errors import MissingExtraError

if TYPE_CHECKING:
    from sklearn.pipeline import Pipeline

NO_DIGIT = -1
CAP_DB = 60.0

# Pulls the background to its mean where the digit hides a whole cell.
FIELD_RIDGE = 0.05

# Coverage below this is noise or the faintest edge.
COVERED = 0.15
# Summed coverage above `COVERED`: the faintest of 4,000 digits has 31, an empty noisy frame 0.4.
LEAST_DIGIT = 6.0
# Digits leave at least 0.32 of a frame free. Below this share, something else covers the frame.
LEAST_FREE = 0.25

CROP = DIGIT_SIZE + 2
ORIENTATIONS = 8
TRAIN_FRAMES = 6000
# Distortions of training frames: generated frames are soft and a little noisy, and their digits
# lean and stretch.
BLUR, NOISE, WARP = 1.0, 0.1, 0.2


def digit_coverage(video: Tensor) -> Tensor:
    """The digit's coverage of each pixel (B, F, H, W) in 0 … 1, from each frame alone.

    Args:
        video: (B, F, 3, H, W) in −1 … 1.
    """
    frames = _displayed(video).flatten(0, 1)
    bright = (frames.amax(1, keepdim=True) - FIELD_MAX).clamp(min=0)
    # The digit's soft edge reaches up to two pixels beyond its bright pixels.
    field = _fit_field(frames, _dilate(bright) <= 0)
    contrast = _digit_colour(frames, bright) - field
    cover = ((frames - field) * contrast).sum(1) / contrast.square().sum(1)
    return cover.clamp(0, 1).unflatten(0, video.shape[:2])


def read_digits(video: Tensor) -> Tensor:
    """The digit that each frame shows (B, F); `NO_DIGIT` for none.

    The first call trains the classifier, which takes a few seconds.

    Args:
        video: (B, F, 3, H, W) in −1 … 1.

    Raises:
        MissingExtraError: scikit-learn is not installed.
    """
    coverage = digit_coverage(video).flatten(0, 1).cpu()
    labels = torch.from_numpy(_classifier().predict(_features(_crop(coverage)).numpy()))
    empty = _ink(coverage).sum((1, 2)) < LEAST_DIGIT
    return labels.masked_fill(empty, NO_DIGIT).view(video.shape[:2])


def background_psnr(video: Tensor, reference_frames: int) -> Tensor:
    """PSNR of each frame's background against that of the clip's first frames.

    Only pixels count that the digit covers neither in the frame nor in all of the first frames.

    Args:
        video: (B, F, 3, H, W) in −1 … 1.
        reference_frames: Number of first frames to compare with.

    Returns:
        (B, F) in dB, peak 2, at most `CAP_DB`; NaN if no pixel counts.
    """
    video = _displayed(video)
    free = _free_of_digit(digit_coverage(video))[:, :, None].float()
    start, start_free = video[:, :reference_frames], free[:, :reference_frames]
    seen = start_free.sum(1)
    reference = (start * start_free).sum(1) / seen.clamp(min=1)
    counted = free * (seen > 0)[:, None]
    squared = (video - reference[:, None]).square().mean(2, keepdim=True) * counted
    error = squared.sum((2, 3, 4)) / counted.sum((2, 3, 4))
    return (10 * torch.log10(4 / error)).clamp(max=CAP_DB)


def _displayed(video: Tensor) -> Tensor:
    """The video as a screen shows it; NaN, from a diverged model, becomes black."""
    return video.detach().float().nan_to_num(nan=-1.0).clamp(-1, 1)


def _dilate(images: Tensor) -> Tensor:
    """The largest value within two pixels, for each pixel of (N, C, H, W)."""
    return F.max_pool2d(images, 5, stride=1, padding=2)


def _ink(coverage: Tensor) -> Tensor:
    return (coverage - COVERED).clamp(min=0)


def _digit_colour(frames: Tensor, bright: Tensor) -> Tensor:
    """Each frame's digit colour (N, 3, 1, 1); white where nothing is bright."""
    weight = bright.pow(4)
    light = ((frames + 1) * weight).sum((2, 3), keepdim=True) + 1e-6
    return 2 * light / light.amax(1, keepdim=True) - 1


def _fit_field(frames: Tensor, known: Tensor) -> Tensor:
    """The smooth background (N, 3, H, W) fitted to the known pixels (N, 1, H, W) of frames."""
    basis = _field_basis(*frames.shape[2:]).to(frames.device)
    weight = known.flatten(1).float()
    squares = (basis[:, None] * basis).flatten(0, 1)
    normal = (weight @ squares.T).unflatten(1, (len(basis), len(basis)))
    normal = normal + FIELD_RIDGE * torch.eye(len(basis), device=frames.device)
    moments = (frames.flatten(2) - FIELD_MEAN) * weight[:, None] @ basis.T
    cells = torch.linalg.solve(normal, moments.mT).mT
    return (cells @ basis + FIELD_MEAN).clamp(-1, FIELD_MAX).view_as(frames)


@cache
def _field_basis(height: int, width: int) -> Tensor:
    """Contribution of each cell of the background to each pixel (cells, H·W)."""
    cells = torch.eye(FIELD_CELLS**2).view(-1, 1, FIELD_CELLS, FIELD_CELLS)
    return F.interpolate(cells, size=(height, width), mode="bicubic").flatten(1)


def _free_of_digit(coverage: Tensor) -> Tensor:
    """Pixels (B, F, H, W) at some distance from the digit."""
    free = _dilate(coverage) < COVERED
    # A frame that is bright all over has lost its background, so all its pixels count.
    return free | (free.float().mean((2, 3), keepdim=True) < LEAST_FREE)


@cache
def _classifier() -> Pipeline:
    """A classifier of coverage, trained on clips of the train split."""
    try:
        from sklearn.decomposition import PCA
        from sklearn.pipeline import make_pipeline
        from sklearn.svm import SVC
    except ImportError as error:
        raise MissingExtraError("the demo world", "demo") from error
    generator = torch.Generator().manual_seed(0)
    clips = sample_clips(TRAIN_FRAMES, 1, generator)
    coverage = digit_coverage(_degrade(clips.video, generator))[:, 0]
    warp = torch.eye(2) + WARP * (2 * torch.rand(TRAIN_FRAMES, 2, 2, generator=generator) - 1)
    classifier = make_pipeline(PCA(60, svd_solver="covariance_eigh"), SVC(C=5))
    return classifier.fit(_features(_crop(coverage, warp)).numpy(), clips.labels.numpy())


def _degrade(video: Tensor, generator: torch.Generator) -> Tensor:
    """Blur each clip of (B, F, 3, H, W) and add noise, by random amounts."""
    amount = torch.rand(2, len(video), 1, 1, 1, 1, generator=generator)
    at = torch.arange(video.shape[-1])
    near = (-((at[:, None] - at) / (BLUR * amount[0] + 1e-3)).square() / 2).exp()
    near = near / near.sum(-1, keepdim=True)
    noise = torch.randn(video.shape, generator=generator)
    return near @ video @ near.mT + NOISE * amount[1] * noise


def _crop(coverage: Tensor, warp: Tensor | None = None) -> Tensor:
    """The digits of (N, H, W) around their centre of mass (N, CROP, CROP).

    Args:
        coverage: (N, H, W).
        warp: Linear map of each crop's coordinates (N, 2, 2); None for the identity.
    """
    height, width = coverage.shape[1:]
    ink = _ink(coverage)
    mass = ink.sum((1, 2)).clamp(min=1e-6)
    y = (ink.sum(2) @ torch.arange(height).float()) / mass
    x = (ink.sum(1) @ torch.arange(width).float()) / mass
    offset = torch.arange(CROP) - (CROP - 1) / 2
    offsets = torch.stack(torch.meshgrid(offset, offset, indexing="xy"), dim=-1)
    if warp is not None:
        offsets = offsets @ warp[:, None]
    pixels = torch.stack([x, y], dim=-1)[:, None, None] + offsets
    grid = (pixels + 0.5) / torch.tensor([width, height]) * 2 - 1
    return F.grid_sample(coverage[:, None], grid, align_corners=False)[:, 0]


def _features(crops: Tensor) -> Tensor:
    """Strength of edges by orientation and place (N, features), whatever the stroke's width."""
    right = crops[:, 1:-1, 2:] - crops[:, 1:-1, :-2]
    down = crops[:, 2:, 1:-1] - crops[:, :-2, 1:-1]
    angle = torch.arange(ORIENTATIONS) * (2 * torch.pi / ORIENTATIONS)
    cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
    along = (right[:, None] * cos + down[:, None] * sin).clamp(min=0)
    # The square sharpens: an edge counts for few orientations.
    strength = (right.square() + down.square()).sqrt()[:, None]
    pooled = F.avg_pool2d(along.square() / (strength + 1e-3), 4, stride=2, padding=1)
    return F.normalize(pooled.flatten(1)).sqrt()
