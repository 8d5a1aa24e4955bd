"""A needle is asked for only in the last chunk, where its places are set and its pixels are not."""

from __future__ import annotations

import torch

from evals.needle import GIVEN, Needle, asking_for, needles, scenes
from evals.worlds.photographs import CHUNK_FRAMES, decode, read_places
from vmla_convert.generating.sampler import State


def test_the_asked_chunk_shows_the_place_of_the_needle() -> None:
    for needle in needles(minute=9):
        given, prompts, asked = scenes(needle, 2)
        seen = given[:, needle.seen_in_chunk * CHUNK_FRAMES :][:, :CHUNK_FRAMES]
        assert given.shape[1] == GIVEN and len(prompts) == 2
        middle = read_places(seen)[:, 0].mean((1, 2)) - read_places(asked)[:, 0].mean((1, 2))
        assert middle.norm(dim=-1).max() < 1


def test_only_places_of_the_last_chunk_are_set() -> None:
    _, _, asked = scenes(Needle("in the sink", 0, 6), 2)
    after_step = asking_for(asked, chunks=2, steps=3)
    free = torch.zeros_like(asked)
    for _ in range(3):
        assert torch.equal(after_step(State(free, torch.tensor(0.5))), free)
    for sigma in (0.5, 0.25, 0.0):
        set_places = after_step(State(free, torch.tensor(sigma)))
        assert decode(set_places).abs().max() == 0
    assert torch.allclose(read_places(set_places), read_places(asked), atol=1e-3)
