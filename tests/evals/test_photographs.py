"""The photograph world: batches repeat, photographs are divided, cameras return, ages are true."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from evals.worlds.clips import photograph_batch
from evals.worlds.photographs import (
    FRAME_SIZE,
    PHOTOGRAPHS,
    Path2D,
    PhotographClips,
    ages,
    decode,
    encode,
    glancing_path,
    read_places,
    with_places,
)
from vmla_convert.config import DataConfig
from vmla_convert.media.clips import LatentClips


def test_a_batch_is_a_function_of_its_number() -> None:
    one, other = (PhotographClips(6, seed=3).clips(2, 2) for _ in range(2))
    assert torch.equal(one.video, other.video)
    assert torch.equal(one.prompt, other.prompt)
    assert not torch.equal(one.video, PhotographClips(6, seed=3).clips(3, 2).video)


def test_photographs_are_for_training_or_for_measuring() -> None:
    assert not set(PHOTOGRAPHS["train"]) & set(PHOTOGRAPHS["held_out"])
    assert all(PHOTOGRAPHS["train"].values())


def test_latents_keep_every_pixel_and_tell_its_place() -> None:
    clips = PhotographClips(20).clips(0, 4, "held_out")
    latents = encode(clips.video, clips.path)
    assert clips.video.abs().max() <= 1
    assert torch.equal(decode(latents), clips.video)
    places = read_places(latents)
    still = Path2D(clips.path.centre[:, :1].expand(-1, 20, -1), *clips.path[1:])
    moved = places - read_places(encode(clips.video, still))
    centre = clips.path.centre - still.centre
    assert torch.allclose(moved, centre[:, :, None, None].expand_as(moved), atol=1e-3)


def test_a_camera_returns() -> None:
    period = 12
    centre = PhotographClips(60, return_within=18).clips(0, 8).path.centre
    furthest = (centre - centre[:, :1]).norm(dim=-1)
    assert (furthest[:, :period].amax(1) > 1).all()
    assert (furthest[:, period:].amin(1) < 2).all()


def test_the_prompt_tells_nothing_of_the_photograph() -> None:
    train, held_out = (PhotographClips(3).clips(0, 1, split) for split in ("train", "held_out"))
    assert train.prompt.shape == held_out.prompt.shape
    assert train.prompt.abs().max() < 6


def test_a_pixel_is_as_old_as_the_last_frame_that_showed_its_place() -> None:
    """The camera moves right by two frames' width and comes back."""
    x = torch.tensor([0.0, FRAME_SIZE * 1.0, FRAME_SIZE * 2.0, FRAME_SIZE * 1.0, 0.0])
    centre = torch.stack([x, torch.zeros(5)], dim=-1)[None]
    found = ages(Path2D(centre, torch.zeros(1, 5), torch.zeros(1, 5)))
    assert (found[0, 0] == 0).all()
    assert (found[0, 2] == 0).all()
    assert (found[0, 3] == 2).all()
    assert (found[0, 4] == 4).all()


def test_frames_of_the_own_chunk_do_not_show_a_place_before() -> None:
    centre, still = torch.zeros(1, 4, 2), torch.zeros(1, 4)
    found = ages(Path2D(centre, still, still), chunk_frames=2)
    assert [found[0, frame].unique().tolist() for frame in range(4)] == [[0], [0], [1], [2]]


def test_a_glance_shows_one_far_place_twice() -> None:
    generator = torch.Generator().manual_seed(0)
    path, _ = glancing_path(24, (1, 5), 12, generator)
    assert torch.equal(path.centre[3:6], path.centre[15:18])
    near = torch.cat([path.centre[:3], path.centre[6:15], path.centre[18:]])
    assert (path.centre[3] - near).norm(dim=-1).min() > FRAME_SIZE
    clips = PhotographClips(24).clips(0, 40)
    far = clips.path.centre.norm(dim=-1).amax(1) > 55
    assert 0 < far.sum() < 20


def test_places_can_be_asked_for() -> None:
    clips = PhotographClips(3).clips(0, 2)
    latents = encode(clips.video, clips.path)
    asked = with_places(latents, latents.roll(1, dims=0))
    assert torch.equal(decode(asked), clips.video)
    assert torch.equal(read_places(asked), read_places(latents.roll(1, dims=0)))


def test_a_file_of_clips_holds_out_other_photographs(tmp_path: Path) -> None:
    file = tmp_path / "clips.safetensors"
    batch = photograph_batch(20, 6, seed=0)
    save_file(batch._asdict(), file)
    clips = LatentClips(DataConfig(str(file)))
    assert len(clips.parts["train"]) == 18
    true = PhotographClips(6).batch(0, 8, "held_out").latents[:2]
    held_out = clips.batch(0, 2, "held_out").latents
    assert {latents.sum().item() for latents in held_out} == {each.sum().item() for each in true}
