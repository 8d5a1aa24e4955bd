"""The photograph world: batches repeat, photographs are divided, cameras return, ages are true."""

from __future__ import annotations

import torch

from evals.worlds.photographs import (
    FRAME_SIZE,
    PHOTOGRAPHS,
    Path2D,
    PhotographClips,
    ages,
    decode,
    encode,
)


def test_a_batch_is_a_function_of_its_number() -> None:
    one, other = (PhotographClips(6, seed=3).clips(2, 2) for _ in range(2))
    assert torch.equal(one.video, other.video)
    assert torch.equal(one.prompt, other.prompt)
    assert not torch.equal(one.video, PhotographClips(6, seed=3).clips(3, 2).video)


def test_photographs_are_for_training_or_for_measuring() -> None:
    assert not set(PHOTOGRAPHS["train"]) & set(PHOTOGRAPHS["held_out"])
    assert all(PHOTOGRAPHS["train"].values())


def test_latents_keep_every_pixel() -> None:
    video = PhotographClips(3).clips(0, 1, "held_out").video
    assert video.abs().max() <= 1
    assert torch.equal(decode(encode(video)), video)


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
