"""Measures of video that need no truth, and the agreement of two videos.

Shapes: B clips, F pixel frames, H height, W width. Pixels are −1 … 1; a video is (B, F, 3, H, W).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from vmla_convert.media.clips import seeded
from vmla_convert.results import Metric

CAP_DB = 60.0
RESAMPLES = 2000
INTERVAL = (0.025, 0.975)
SSIM_SIDE, SSIM_SIGMA = 11, 1.5
SSIM_CONSTANTS = (0.02**2, 0.06**2)
"""Squares of 1 % and 3 % of the range of pixels, 2 (Wang et al. 2004)."""


def frame_psnr(video: Tensor, reference: Tensor) -> Tensor:
    """PSNR of each frame (B, F) in dB, peak 2, at most `CAP_DB`."""
    error = (video - reference).square().mean((2, 3, 4))
    return (10 * torch.log10(4 / error)).clamp(max=CAP_DB)


def frame_ssim(video: Tensor, reference: Tensor) -> Tensor:
    """Structural similarity of each frame (B, F), with a Gaussian window of 11 pixels.

    The mean over channels and over the pixels whose window is inside the frame (Wang et al. 2004).

    Raises:
        ValueError: A frame is smaller than the window.
    """
    if min(video.shape[-2:]) < SSIM_SIDE:
        raise ValueError(f"frames of {tuple(video.shape[-2:])} are smaller than {SSIM_SIDE} pixels")
    at = torch.arange(SSIM_SIDE) - SSIM_SIDE // 2
    near = (-at.square() / (2 * SSIM_SIGMA**2)).exp()
    near = (near / near.sum()).to(video)

    def smooth(images: Tensor) -> Tensor:
        rows = F.conv2d(images, near.view(1, 1, -1, 1))
        return F.conv2d(rows, near.view(1, 1, 1, -1))

    a, b = (each.flatten(0, 2)[:, None] for each in (video, reference))
    mean_a, mean_b = smooth(a), smooth(b)
    var_a, var_b = smooth(a * a) - mean_a**2, smooth(b * b) - mean_b**2
    shared = smooth(a * b) - mean_a * mean_b
    light, contrast = SSIM_CONSTANTS
    likeness = (2 * mean_a * mean_b + light) * (2 * shared + contrast)
    likeness /= (mean_a**2 + mean_b**2 + light) * (var_a + var_b + contrast)
    return likeness.mean((1, 2, 3)).view(*video.shape[:2], -1).mean(2)


def sharpness(video: Tensor) -> Tensor:
    """Root mean square difference of neighbouring pixels in each frame (B, F).

    Squares, because blur spreads an edge and leaves the sum of plain differences as it was.
    """
    down, right = video.diff(dim=-2).square(), video.diff(dim=-1).square()
    return ((down.mean((2, 3, 4)) + right.mean((2, 3, 4))) / 2).sqrt()


def dynamic_degree(video: Tensor) -> Tensor:
    """Mean difference of a frame to the frame before (B, F − 1)."""
    return video.diff(dim=1).abs().mean((2, 3, 4))


def flicker(video: Tensor) -> Tensor:
    """Mean distance of a frame from the middle of its neighbours in time (B, F − 2).

    Steady change does not count, unlike in the difference of consecutive frames.
    """
    return video.diff(n=2, dim=1).abs().mean((2, 3, 4)) / 2


def interval(values: Tensor) -> tuple[float, float]:
    """Ends of the 95 % bootstrap interval of the mean over clips (B,); NaN values are left out."""
    values = values[values.isfinite()]
    if not len(values):
        return float("nan"), float("nan")
    picks = torch.randint(
        len(values), (RESAMPLES, len(values)), generator=seeded(0, 0, "bootstrap")
    )
    means = values[picks].mean(1).double()
    low, high = means.quantile(torch.tensor(INTERVAL, dtype=torch.float64)).tolist()
    return low, high


@dataclass
class FrameMeasures:
    """Measures of every frame of a video that is seen chunk by chunk, in constant memory.

    Attributes:
        values: By metric, one (B, frames) tensor per chunk.
        seams: Difference of each chunk's first frame to the frame before it, (B,) per chunk.
    """

    values: dict[Metric, list[Tensor]] = field(default_factory=dict[Metric, list[Tensor]])
    seams: list[Tensor] = field(default_factory=list[Tensor])
    _last: Tensor | None = None
    _colour: Tensor | None = None

    def add(self, chunk: Tensor) -> None:
        """Measure the next frames (B, F, 3, H, W)."""
        chunk = chunk.detach().float().cpu().nan_to_num(nan=-1.0).clamp(-1, 1)
        before = chunk[:, :0] if self._last is None else self._last
        if self._colour is None:
            self._colour = chunk.mean((1, 3, 4))[:, None]
        joined = torch.cat([before, chunk], dim=1)
        distance = (chunk.mean((3, 4)) - self._colour).square().mean(2).sqrt()
        self._keep(Metric.SHARPNESS, sharpness(chunk))
        self._keep(Metric.COLOUR_DRIFT, distance)
        motion = dynamic_degree(joined[:, max(0, before.shape[1] - 1) :])
        self._keep(Metric.DYNAMIC_DEGREE, motion)
        if before.shape[1]:
            self.seams.append(motion[:, 0])
        if joined.shape[1] > 2:
            self._keep(Metric.FLICKER, flicker(joined))
        self._last = joined[:, -2:]

    def chunk_seam(self) -> Tensor:
        """Difference of frames where chunks meet over that of all frames, (B,); 1: no seam."""
        everywhere = torch.cat(self.values[Metric.DYNAMIC_DEGREE], dim=1).mean(1)
        return torch.stack(self.seams, dim=1).mean(1) / everywhere.clamp_min(1e-12)

    def segments(self, metric: Metric, count: int) -> list[Tensor]:
        """Means over the frames of equal parts of the video, each (B,)."""
        whole = torch.cat(self.values[metric], dim=1)
        return [part.mean(1) for part in whole.tensor_split(count, dim=1)]

    def _keep(self, metric: Metric, values: Tensor) -> None:
        self.values.setdefault(metric, []).append(values)
