"""The demo world's judge: reads generated clips, where no truth is known.

Which digit does a frame show, and has the background stayed what the clip's first frames showed?
Both start from one estimate, how much of each pixel is digit, which undoes the world's own
rendering: a bright digit of one colour, mixed over a smooth dark background.
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

# Holds the field near its mean where the digit hides a whole cell.
FIELD_RIDGE = 0.05

# Coverage below this is noise or the faintest edge.
COVERED = 0.15
# Summed coverage above that: the faintest of 4,000 digits has 31, an empty noisy frame 0.4.
LEAST_DIGIT = 6.0
# The world's digits leave 0.32 of a frame free or more; below this, it is no digit that covers.
LEAST_FREE = 0.25

CROP = DIGIT_SIZE + 2
ORIENTATIONS = 8
TRAIN_FRAMES = 6000
# How unlike the truth training frames are: a generated frame is soft and a little noisy, and its
# digit leans and stretches as other hands would write it.
BLUR, NOISE, WARP = 1.0, 0.1, 0.2


def digit_coverage(video: Tensor) -> Tensor:
    """How much of each pixel is digit (B, F, H, W) in 0 … 1, from each frame alone.

    Args:
        video: (B, F, 3, H, W) in −1 … 1.
    """
    frames = _displayed(video).flatten(0, 1)
    bright = (frames.amax(1, keepdim=True) - FIELD_MAX).clamp(min=0)
    # Two pixels around what is surely digit may still be its soft edge.
    field = _fit_field(frames, _dilate(bright) <= 0)
    contrast = _digit_colour(frames, bright) - field
    cover = ((frames - field) * contrast).sum(1) / contrast.square().sum(1)
    return cover.clamp(0, 1).unflatten(0, video.shape[:2])


def read_digits(video: Tensor) -> Tensor:
    """The digit that each frame shows (B, F), `NO_DIGIT` where it shows none.

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


def digit_accuracy(video: Tensor, labels: Tensor) -> Tensor:
    """Whether each frame shows the digit it should (B, F), bool.

    Args:
        video: (B, F, 3, H, W) in −1 … 1.
        labels: (B,), or (B, F) where the prompt changes on the way.
    """
    wanted = labels.cpu()
    return read_digits(video) == (wanted if wanted.ndim == 2 else wanted[:, None])


def background_psnr(video: Tensor, reference_frames: int) -> Tensor:
    """How well each frame keeps the background of the clip's first frames.

    Pixels count where the digit covers neither the frame nor all of the first frames.

    Args:
        video: (B, F, 3, H, W) in −1 … 1.
        reference_frames: How many first frames show the background as it should stay.

    Returns:
        (B, F) in dB, peak 2, at most `CAP_DB`; NaN where no pixel can be compared.
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
    """The video as a screen would show it; a diverged model's NaN is black."""
    return video.detach().float().nan_to_num(nan=-1.0).clamp(-1, 1)


def _dilate(images: Tensor) -> Tensor:
    """Each pixel of (N, C, H, W) takes the largest value within two pixels."""
    return F.max_pool2d(images, 5, stride=1, padding=2)


def _ink(coverage: Tensor) -> Tensor:
    return (coverage - COVERED).clamp(min=0)


def _digit_colour(frames: Tensor, bright: Tensor) -> Tensor:
    """Each frame's digit colour (N, 3, 1, 1); white where nothing is bright."""
    weight = bright.pow(4)
    light = ((frames + 1) * weight).sum((2, 3), keepdim=True) + 1e-6
    return 2 * light / light.amax(1, keepdim=True) - 1


def _fit_field(frames: Tensor, known: Tensor) -> Tensor:
    """The smooth background (N, 3, H, W) that fits the pixels `known` (N, 1, H, W) of frames."""
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
    """What each cell of the background contributes to each pixel (cells, H·W)."""
    cells = torch.eye(FIELD_CELLS**2).view(-1, 1, FIELD_CELLS, FIELD_CELLS)
    return F.interpolate(cells, size=(height, width), mode="bicubic").flatten(1)


def _free_of_digit(coverage: Tensor) -> Tensor:
    """Pixels (B, F, H, W) at some distance from the digit."""
    free = _dilate(coverage) < COVERED
    # A frame that turned bright all over has lost its background and must not be excused.
    return free | (free.float().mean((2, 3), keepdim=True) < LEAST_FREE)


@cache
def _classifier() -> Pipeline:
    """Trained on the train split's clips, seen through the judge's own coverage."""
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
    """Each clip of (B, F, 3, H, W) blurred and made noisy by a random amount."""
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
        warp: (N, 2, 2) how each crop is turned and stretched; not at all by default.
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
    """How much edge of each orientation is where (N, features): as strokes run, in any weight."""
    right = crops[:, 1:-1, 2:] - crops[:, 1:-1, :-2]
    down = crops[:, 2:, 1:-1] - crops[:, :-2, 1:-1]
    angle = torch.arange(ORIENTATIONS) * (2 * torch.pi / ORIENTATIONS)
    cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
    along = (right[:, None] * cos + down[:, None] * sin).clamp(min=0)
    # Squared and divided by the strength once, so that a step counts for few orientations.
    strength = (right.square() + down.square()).sqrt()[:, None]
    pooled = F.avg_pool2d(along.square() / (strength + 1e-3), 4, stride=2, padding=1)
    return F.normalize(pooled.flatten(1)).sqrt()
