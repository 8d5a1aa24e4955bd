"""Scores of rollouts: the truth scores best, and each way to break a video lowers its score."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from evals.rollout import SEGMENTS, scored
from evals.worlds.photographs import CHANNELS
from evals.worlds.train import CONFIG
from evals.worlds.worlds import WORLDS, Digits, Photographs, Scene, World
from vmla_convert.layers.dit import CausalWanModel
from vmla_convert.loading.load import load
from vmla_convert.results import Metric, Row

FRAMES, CLIPS = 24, 4


class Case:
    """A world, its scenes, and the frames that a perfect model would make."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.scene: Scene = world.scenes(CLIPS, world.given_frames + FRAMES)

    def broken(self, change: Callable[[Tensor], Tensor]) -> Tensor:
        """True latents whose frames after the given ones are changed."""
        given = self.world.given_frames
        latents = self.scene.latents
        return torch.cat([latents[:, :given], change(latents[:, given:])], dim=1)

    def mean(self, metric: Metric, latents: Tensor) -> float:
        return self.world.score(self.scene, latents)[metric].nanmean().item()


@pytest.fixture(scope="module")
def digits() -> Case:
    return Case(Digits())


@pytest.fixture(scope="module")
def photographs() -> Case:
    return Case(Photographs())


def shuffled(latents: Tensor) -> Tensor:
    return latents[:, torch.randperm(FRAMES, generator=torch.Generator().manual_seed(0))]


def swapped(latents: Tensor) -> Tensor:
    """Another scene's frames."""
    return latents.roll(1, dims=0)


def blurred(latents: Tensor) -> Tensor:
    return F.avg_pool2d(latents.flatten(0, 1), 3, 1, 1, count_include_pad=False).view_as(latents)


def frozen(latents: Tensor) -> Tensor:
    return latents[:, :1].expand_as(latents)


def delayed(latents: Tensor) -> Tensor:
    return torch.cat([latents[:, :1].expand(-1, 3, -1, -1, -1), latents[:, :-3]], dim=1)


def test_the_truth_of_both_worlds_has_the_best_scores(digits: Case, photographs: Case) -> None:
    assert digits.mean(Metric.DIGIT_ACCURACY, digits.scene.latents) > 0.9
    assert digits.mean(Metric.BACKGROUND_PSNR, digits.scene.latents) > 50
    assert digits.mean(Metric.MOTION_ERROR, digits.scene.latents) < 0.2
    assert photographs.mean(Metric.REVISIT_PSNR, photographs.scene.latents) == 60
    assert photographs.mean(Metric.MOTION_ERROR, photographs.scene.latents) < 1e-3


@pytest.mark.parametrize(
    ("metric", "change", "least"),
    [
        (Metric.MOTION_ERROR, shuffled, 1.0),
        (Metric.MOTION_ERROR, frozen, 1.0),
        (Metric.MOTION_ERROR, delayed, 0.5),
        (Metric.DIGIT_ACCURACY, swapped, -0.3),
        (Metric.BACKGROUND_PSNR, swapped, -20.0),
        (Metric.BACKGROUND_PSNR, blurred, -3.0),
    ],
)
def test_a_broken_video_of_digits_scores_worse(
    digits: Case, metric: Metric, change: Callable[[Tensor], Tensor], least: float
) -> None:
    """`least` is how far a score must move: up for errors, down for what should be high."""
    moved = digits.mean(metric, digits.broken(change)) - digits.mean(metric, digits.scene.latents)
    assert moved >= least if least > 0 else moved <= least


@pytest.mark.parametrize("change", [shuffled, swapped, blurred, frozen, delayed])
def test_a_broken_video_of_photographs_scores_worse(
    photographs: Case, change: Callable[[Tensor], Tensor]
) -> None:
    latents = photographs.broken(change)
    assert photographs.mean(Metric.REVISIT_PSNR, latents) < 40
    if change is not blurred:  # the mean of places is the middle place
        assert photographs.mean(Metric.MOTION_ERROR, latents) > 1


def test_only_places_that_the_given_frames_showed_count(photographs: Case) -> None:
    """A camera of these scenes is back within the given frames, so nearly every place counts."""
    scene = photographs.scene
    score = photographs.world.score(scene, scene.latents)[Metric.REVISIT_PSNR]
    assert score.isfinite().all()


def test_rows_name_segments_intervals_and_slopes(digits: Case) -> None:
    model = load("demo")
    fading = digits.broken(
        lambda latents: latents + torch.linspace(0, 0.3, FRAMES)[:, None, None, None]
    )
    rows = scored(model, digits.world, digits.scene, fading, None)
    psnr = [row for row in rows if row.metric == Metric.BACKGROUND_PSNR]
    assert [row.segment for row in psnr] == list(range(SEGMENTS))
    assert all(row.low is not None and row.low <= row.value for row in psnr)
    slopes = {row.note: row.value for row in rows if row.metric == Metric.SLOPE}
    assert slopes[Metric.BACKGROUND_PSNR] < -10
    assert _value(rows, Metric.COLOUR_DRIFT, SEGMENTS - 1) > _value(rows, Metric.COLOUR_DRIFT, 0)


def test_a_switch_is_scored_by_both_digits(digits: Case) -> None:
    """A model that goes on with the old digit is read to show it, and not the new one."""
    rows = scored(load("demo"), digits.world, digits.scene, digits.scene.latents, None, switch=True)
    assert {row.metric for row in rows} == {Metric.DIGIT_ACCURACY}
    values = {(row.note, row.segment): row.value for row in rows}
    assert len(values) == 2 * SEGMENTS
    for segment in range(SEGMENTS):
        assert values["old digit", segment] > 0.9 and values["new digit", segment] < 0.1


def _value(rows: list[Row], metric: Metric, segment: int) -> float:
    return next(r.value for r in rows if r.metric == metric and r.segment == segment)


def test_the_model_of_photographs_fits_its_world() -> None:
    source = WORLDS["photographs"].clips(3, 0)
    latents, context = source.batch(0, 1)
    geometry = CONFIG.geometry
    assert tuple(latents.shape[2:]) == (CHANNELS, *CONFIG.latent_size)
    assert tuple(context.shape[1:]) == (geometry.text_len, geometry.text_dim)
    with torch.device("meta"):
        model = CausalWanModel(CONFIG)
    numbers = sum(parameter.numel() for parameter in model.parameters())
    assert numbers > 6e6 and geometry.dim // geometry.num_heads == 64
