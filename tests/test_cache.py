"""The cache's slots against a plain list of frames."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference.window import held_frames
from torch import Tensor

from vmla_convert.config import CachePolicy
from vmla_convert.layers.cache import KVCache

BATCH, TOKENS = 2, 3
WIDTHS = [(4, 2), (5,)]


@st.composite
def rollouts(draw: st.DrawFn) -> tuple[int, int, list[int]]:
    """Window, sink, and the sizes of chunks that fit."""
    sink, room = draw(st.integers(0, 3)), draw(st.integers(1, 5))
    return sink + room, sink, draw(st.lists(st.integers(1, room), min_size=1, max_size=8))


ROLLOUTS = given(rollouts(), st.sampled_from(["absolute", "relative"]))


def open_cache(window: int, sink: int, positions: str) -> KVCache:
    assert positions in ("absolute", "relative")
    policy = CachePolicy(window, sink, positions)
    return KVCache(policy, [*WIDTHS], BATCH, TOKENS)


def entry(frames: list[int], width: int, version: int = 0) -> Tensor:
    """(B, T, width) in which every number tells its clip, frame, token, channel and version."""
    numbers = [
        [
            [b + 10 * w + 100 * t + 1000 * f + 100_000 * version for w in range(width)]
            for f in frames
            for t in range(TOKENS)
        ]
        for b in range(BATCH)
    ]
    return torch.tensor(numbers, dtype=torch.float32)


def frames_in(view: Tensor) -> list[int]:
    """Frames whose entries are in a view, in its order."""
    return [int(x) // 1000 % 100 for x in view[0, ::TOKENS, 0].tolist()]


@ROLLOUTS
def test_slots_hold_the_sink_and_the_latest_frames(
    rollout: tuple[int, int, list[int]], positions: str
) -> None:
    window, sink, chunks = rollout
    cache, count = open_cache(window, sink, positions), 0
    for size in chunks:
        cache.open_chunk(size)
        new, count = list(range(count, count + size)), count + size
        for layer, widths in enumerate(WIDTHS):
            for version in (1, 0):  # two denoising steps: the later one stays
                views = cache.update(layer, tuple(entry(new, width, version) for width in widths))
            held = frames_in(views[0])
            assert sorted(held) == held_frames(count, window, sink)
            for view, width in zip(views, widths, strict=True):
                assert torch.equal(view, entry(held, width))
            order = held if positions == "absolute" else [sorted(held).index(f) for f in held]
            assert cache.positions().tolist() == order
            expected = [order[held.index(f)] for f in new]
            assert cache.chunk_positions().tolist() == expected


@ROLLOUTS
def test_update_writes_the_open_chunk_only_and_returns_a_view(
    rollout: tuple[int, int, list[int]], positions: str
) -> None:
    window, sink, chunks = rollout
    cache, count = open_cache(window, sink, positions), 0
    for size in chunks:
        cache.open_chunk(size)
        new, count = list(range(count, count + size)), count + size
        (before,) = cache.update(1, (entry(new, 5),))
        kept, held = before.clone(), frames_in(before)
        (after,) = cache.update(1, (entry(new, 5, version=7),))
        rewritten = torch.tensor([f in new for f in held]).repeat_interleave(TOKENS)
        assert torch.equal(after[:, ~rewritten], kept[:, ~rewritten])
        assert (after[:, rewritten] - kept[:, rewritten] == 700_000).all()
        assert torch.equal(before, after)
        assert before.data_ptr() == after.data_ptr()
        cache.update(1, (entry(new, 5),))


@ROLLOUTS
def test_the_past_is_every_held_token_but_the_open_chunks(
    rollout: tuple[int, int, list[int]], positions: str
) -> None:
    window, sink, chunks = rollout
    cache, count = open_cache(window, sink, positions), 0
    assert cache.past_tokens().tolist() == []
    for size in chunks:
        cache.open_chunk(size)
        new, count = list(range(count, count + size)), count + size
        (view,) = cache.update(1, (entry(new, 5),))
        past = cache.past_tokens()
        before = [f for f in frames_in(view) if f not in new]
        assert sorted(before) == [f for f in held_frames(count, window, sink) if f < new[0]]
        assert torch.equal(view[:, past], entry(before, 5).view(BATCH, -1, 5))
        tokens = [t for t in range(view.shape[1]) if t not in past.tolist()]
        assert sorted(frames_in(view[:, tokens])) == new


def test_the_worked_example_of_the_module() -> None:
    cache = open_cache(6, 2, "relative")
    for first in (0, 2, 4, 6):
        cache.open_chunk(2)
        (view,) = cache.update(1, (entry([first, first + 1], 5),))
    assert frames_in(view) == [0, 1, 6, 7, 4, 5]
    assert cache.positions().tolist() == [0, 1, 4, 5, 2, 3]
    assert cache.chunk_positions().tolist() == [4, 5]
    slots = [0, 1, 4, 5]
    assert cache.past_tokens().tolist() == [
        3 * slot + token for slot in slots for token in range(3)
    ]


@pytest.mark.parametrize("already", [0, 1, 3])
def test_a_chunk_larger_than_the_window_leaves_room_for_is_refused(already: int) -> None:
    cache = open_cache(5, 2, "absolute")
    for _ in range(already):
        cache.open_chunk(2)
    held = cache.positions()
    with pytest.raises(ValueError, match="chunk of 4 frames"):
        cache.open_chunk(4)
    assert torch.equal(cache.positions(), held)
    cache.open_chunk(3)


def test_entries_are_kept_in_the_cache_dtype() -> None:
    cache = KVCache(CachePolicy(4), [(5,)], BATCH, TOKENS, dtype=torch.bfloat16)
    cache.open_chunk(1)
    (view,) = cache.update(0, (torch.ones(BATCH, TOKENS, 5),))
    assert view.dtype == torch.bfloat16
    assert cache.nbytes == 2 * BATCH * 4 * TOKENS * 5
