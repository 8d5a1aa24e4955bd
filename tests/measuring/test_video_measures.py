"""Measures of video: each falls or rises when a video is broken in its way, and only then."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from skimage.metrics import structural_similarity
from torch import Tensor

from vmla_convert.demo.world import sample_clips
from vmla_convert.measuring.video import (
    CAP_DB,
    FrameMeasures,
    dynamic_degree,
    flicker,
    frame_psnr,
    frame_ssim,
    interval,
    sharpness,
)
from vmla_convert.media.clips import seeded
from vmla_convert.results import Metric

CHUNK = 2


@pytest.fixture(scope="module")
def video() -> Tensor:
    return sample_clips(3, 12, seeded(0, 0, "video")).video


def shuffled(video: Tensor) -> Tensor:
    return video[:, torch.randperm(video.shape[1], generator=seeded(0, 0, "shuffle"))]


def blurred(video: Tensor) -> Tensor:
    return F.avg_pool2d(video.flatten(0, 1), 3, 1, 1, count_include_pad=False).view_as(video)


def frozen(video: Tensor) -> Tensor:
    return video[:, :1].expand_as(video)


def darkened(video: Tensor) -> Tensor:
    return video - torch.linspace(0, 0.5, video.shape[1])[:, None, None, None]


def jumping(video: Tensor) -> Tensor:
    """Every other chunk is brighter."""
    bright = torch.arange(video.shape[1]) // CHUNK % 2
    return video + 0.3 * bright[:, None, None, None]


def measured(video: Tensor) -> FrameMeasures:
    measures = FrameMeasures()
    for chunk in video.split(CHUNK, dim=1):
        measures.add(chunk)
    return measures


def mean(metric: Metric) -> Callable[[Tensor], float]:
    return lambda video: torch.cat(measured(video).values[metric], dim=1).mean().item()


def test_shuffled_frames_flicker(video: Tensor) -> None:
    assert mean(Metric.FLICKER)(shuffled(video)) > 1.5 * mean(Metric.FLICKER)(video)


def test_a_blurred_video_is_less_sharp(video: Tensor) -> None:
    assert mean(Metric.SHARPNESS)(blurred(video)) < 0.8 * mean(Metric.SHARPNESS)(video)


def test_a_frozen_video_has_no_motion_and_no_flicker(video: Tensor) -> None:
    assert mean(Metric.DYNAMIC_DEGREE)(frozen(video)) == 0
    assert mean(Metric.FLICKER)(frozen(video)) == 0
    assert mean(Metric.DYNAMIC_DEGREE)(video) > 0.01


def test_a_darkening_video_drifts_in_colour_but_does_not_flicker(video: Tensor) -> None:
    still = frozen(video)
    last = measured(darkened(still)).segments(Metric.COLOUR_DRIFT, 4)[-1]
    assert (last > 10 * measured(still).segments(Metric.COLOUR_DRIFT, 4)[-1]).all()
    assert (last > 0.1).all()
    assert mean(Metric.FLICKER)(darkened(still)) < 0.01


def test_chunks_that_do_not_fit_together_have_seams(video: Tensor) -> None:
    assert (measured(jumping(video)).chunk_seam() > 1.5 * measured(video).chunk_seam()).all()


def test_measures_by_chunk_are_those_of_the_whole_video(video: Tensor) -> None:
    whole = {
        Metric.SHARPNESS: sharpness(video),
        Metric.DYNAMIC_DEGREE: dynamic_degree(video),
        Metric.FLICKER: flicker(video),
    }
    for metric, values in whole.items():
        assert torch.allclose(torch.cat(measured(video).values[metric], dim=1), values)


def test_a_diverged_video_is_measured_as_black(video: Tensor) -> None:
    broken = measured(torch.full_like(video, float("nan")))
    assert torch.cat(broken.values[Metric.SHARPNESS], dim=1).abs().max() == 0


def test_equal_frames_agree_and_noise_lowers_both_measures(video: Tensor) -> None:
    assert (frame_psnr(video, video) == CAP_DB).all()
    assert torch.allclose(frame_ssim(video, video), torch.ones(video.shape[:2]), atol=1e-5)
    noise = torch.randn(video.shape, generator=seeded(0, 0, "noise"))
    little, much = video + 0.05 * noise, video + 0.2 * noise
    for measure in (frame_psnr, frame_ssim):
        assert (measure(little, video) > measure(much, video)).all()


def test_ssim_is_that_of_scikit_image(video: Tensor) -> None:
    other = blurred(video)
    theirs = structural_similarity(
        video[0, 0].numpy(),
        other[0, 0].numpy(),
        data_range=2.0,
        channel_axis=0,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
    )
    # Theirs counts only pixels far from the border, as ours does.
    assert frame_ssim(other, video)[0, 0].item() == pytest.approx(theirs, abs=1e-4)


def test_frames_smaller_than_the_window_are_refused(video: Tensor) -> None:
    with pytest.raises(ValueError, match="smaller"):
        frame_ssim(video[..., :8, :8], video[..., :8, :8])


def test_the_interval_holds_the_mean_and_narrows_with_more_clips() -> None:
    values = torch.randn(400, generator=seeded(0, 0, "values"))
    few, many = interval(values[:10]), interval(values)
    assert many[0] < values.mean() < many[1]
    assert many[1] - many[0] < few[1] - few[0]
    assert interval(torch.tensor([1.0, float("nan"), 1.0])) == (1.0, 1.0)
