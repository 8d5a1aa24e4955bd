"""The judge agrees with the world's truth, and sees each way in which a clip can go wrong."""

from __future__ import annotations

import math
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vmla_convert.demo import judge
from vmla_convert.demo.judge import (
    CAP_DB,
    NO_DIGIT,
    background_psnr,
    digit_coverage,
    read_digits,
)
from vmla_convert.demo.world import Clips, sample_clips
from vmla_convert.errors import MissingExtraError


@pytest.fixture(scope="module")
def clips() -> Clips:
    return sample_clips(150, 4, torch.Generator().manual_seed(7), "held_out")


def hits(video: Tensor, labels: Tensor) -> float:
    """Share of frames that show the digit they should."""
    return (read_digits(video) == labels[:, None]).float().mean().item()


def noise_like(video: Tensor) -> Tensor:
    return torch.randn(video.shape, generator=torch.Generator().manual_seed(1))


def test_coverage_is_the_truth_of_the_world(clips: Clips) -> None:
    assert (digit_coverage(clips.video) - clips.alpha).abs().mean() < 0.01


def test_coverage_takes_each_frame_alone(clips: Clips) -> None:
    whole, last = digit_coverage(clips.video), digit_coverage(clips.video[:, 3:])
    torch.testing.assert_close(whole[:, 3:], last, atol=1e-4, rtol=0)


def test_truth_reads_as_truth(clips: Clips) -> None:
    assert hits(clips.video, clips.labels) >= 0.94


@pytest.mark.parametrize(("sigma", "least"), [(0.05, 0.93), (0.1, 0.91)])
def test_noise_costs_little(clips: Clips, sigma: float, least: float) -> None:
    noisy = clips.video + sigma * noise_like(clips.video)
    assert hits(noisy, clips.labels) >= least


def test_softness_costs_little(clips: Clips) -> None:
    soft = F.avg_pool2d(clips.video.flatten(0, 1), 2, stride=1)
    soft = F.pad(soft, (0, 1, 0, 1), mode="replicate").view_as(clips.video)
    assert hits(soft, clips.labels) >= 0.91


def test_another_digit_reads_low(clips: Clips) -> None:
    assert hits(clips.video, (clips.labels + 1) % 10) < 0.05


def test_a_frame_without_digit_shows_none(clips: Clips) -> None:
    empty = clips.background[:, None]
    assert (read_digits(empty) == NO_DIGIT).all()
    assert (read_digits(empty + 0.05 * noise_like(empty)) == NO_DIGIT).all()


def test_a_diverged_frame_is_judged_and_not_fatal(clips: Clips) -> None:
    broken = clips.video[:1].clone()
    broken[:, 3] = torch.nan
    assert read_digits(broken)[0, 3] == NO_DIGIT
    assert background_psnr(broken, 2)[0, 3] < 20


def test_reading_is_deterministic(clips: Clips) -> None:
    first = read_digits(clips.video)
    judge._classifier.cache_clear()
    assert torch.equal(read_digits(clips.video), first)


def test_true_background_stays(clips: Clips) -> None:
    psnr = background_psnr(clips.video, 2)
    assert psnr.shape == (150, 4)
    assert psnr.min() > 45 and psnr.mean() > 59


def test_replaced_background_lowers_psnr(clips: Clips) -> None:
    other = clips.background.roll(1, 0) - clips.background
    replaced = clips.video.clone()
    replaced[:, 2:] += other[:, None] * (1 - clips.alpha[:, 2:, None])
    psnr = background_psnr(replaced, 2)
    assert psnr[:, :2].min() > 45 and psnr[:, 2:].max() < 25


@pytest.mark.parametrize("delta", [0.05, -0.2])
def test_a_brightness_shift_has_its_exact_psnr(delta: float) -> None:
    video = torch.full((1, 4, 3, 24, 24), -0.4)
    video[:, 2:] += delta
    expected = 10 * math.log10(4 / delta**2)
    assert background_psnr(video, 2)[0].tolist() == pytest.approx(
        [CAP_DB, CAP_DB, expected, expected], abs=1e-3
    )


def test_a_frame_bright_all_over_is_no_digit(clips: Clips) -> None:
    white = clips.video[:1].clone()
    white[:, 3] = 1.0
    assert background_psnr(white, 2)[0, 3] < 15


def test_without_scikit_learn_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.svm", None)
    judge._classifier.cache_clear()
    with pytest.raises(MissingExtraError, match="for the demo world are not installed") as caught:
        read_digits(torch.zeros(1, 1, 3, 24, 24))
    assert "[demo]" in caught.value.hint
