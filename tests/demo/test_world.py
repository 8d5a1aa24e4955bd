"""The demo world: deterministic, split by image, and true to its own truth."""

from __future__ import annotations

import torch
from torch import Tensor

from vmla_convert.demo.world import FRAME_SIZE, Clips, digit_images, sample_clips


def world(
    seed: int, frames: int = 8, batch: int = 16, times: Tensor | None = None, held_out: bool = False
) -> Clips:
    generator = torch.Generator().manual_seed(seed)
    return sample_clips(batch, frames, generator, "held_out" if held_out else "train", times)


def test_the_generator_decides_everything() -> None:
    torch.manual_seed(1)
    first = world(3)
    torch.manual_seed(2)
    again, other = world(3), world(4)
    for name in Clips._fields:
        assert torch.equal(getattr(first, name), getattr(again, name))
        assert not torch.equal(getattr(first, name), getattr(other, name))


def test_no_held_out_image_is_trained_on() -> None:
    trained, _ = digit_images("train")
    held_out, labels = digit_images("held_out")
    assert not torch.cdist(held_out.flatten(1), trained.flatten(1)).le(1e-3).any()
    assert len(trained) > len(held_out) > 200
    assert sorted(labels.unique().tolist()) == list(range(10))


def test_each_split_shows_its_own_images() -> None:
    """The same random index names other images in the other split."""
    clips = world(0), world(0, held_out=True)
    assert not torch.equal(clips[0].alpha, clips[1].alpha)
    assert not torch.equal(clips[0].labels, clips[1].labels)


def test_pixels_stay_in_range() -> None:
    clips = world(0, batch=64)
    assert clips.video.shape == (64, 8, 3, FRAME_SIZE, FRAME_SIZE)
    for pixels in (clips.video, clips.background):
        assert pixels.min() >= -1
        assert pixels.max() <= 1
    assert clips.alpha.min() >= 0
    assert clips.alpha.max() <= 1


def test_the_background_shows_where_no_digit_is() -> None:
    clips = world(0)
    free = (clips.alpha == 0)[:, :, None].expand_as(clips.video)
    background = clips.background[:, None].expand_as(clips.video)
    assert torch.equal(clips.video[free], background[free])
    assert not torch.isclose(clips.video[~free], background[~free]).all()
    assert 0.3 < free.float().mean() < 0.95
    assert (clips.background.flatten(1).std(1) > 0.05).all()


def test_the_digit_hides_the_background_with_one_colour() -> None:
    clips = world(0)
    covered = clips.alpha > 0.999
    for clip in range(16):
        pixels = clips.video[clip].movedim(1, -1)[covered[clip]]
        if len(pixels):
            assert (pixels - pixels[0]).abs().max() < 0.01
    assert covered.any()


def test_the_digit_stays_whole_and_inside() -> None:
    alpha = world(1, frames=60, batch=32).alpha
    mass = alpha.sum(dim=(2, 3))
    assert ((mass - mass[:, :1]).abs() / mass[:, :1]).max() < 0.1
    assert mass.min() > 10


def centres(alpha: Tensor) -> Tensor:
    """Centre of mass (B, F, 2) of the digit."""
    pixels = torch.arange(FRAME_SIZE).float()
    weights = alpha / alpha.sum(dim=(2, 3), keepdim=True)
    return torch.stack([weights.sum(3) @ pixels, weights.sum(2) @ pixels], dim=-1)


def test_the_digit_moves_straight_until_it_bounces() -> None:
    paths = centres(world(1, frames=60, batch=32).alpha)
    steps = paths.diff(dim=1)
    speed = steps.norm(dim=-1)
    assert speed.max() < 1.7
    assert (speed.amax(1) > 0.4).all()
    # Each axis keeps its speed and, except where it bounces, its direction.
    straight = (steps.diff(dim=1).abs() < 0.15).float().mean()
    assert 0.7 < straight < 1
    assert (steps[:, 1:] * steps[:, :-1] < -0.05).any(dim=1).any()


def test_frames_show_the_moments_they_are_asked_for() -> None:
    whole = world(5, frames=12)
    moments = torch.tensor([0, 1, 7, 11])
    jumped = world(5, frames=4, times=moments.expand(16, 4))
    torch.testing.assert_close(jumped.video, whole.video[:, moments])
    assert torch.equal(jumped.background, whole.background)
    assert not torch.allclose(whole.video[:, 2], whole.video[:, 7])
