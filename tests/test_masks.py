"""Masks against what a plain list of held frames says."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference.window import held_frames

from vmla_convert.config import CachePolicy
from vmla_convert.maths.masks import block_causal_mask, teacher_forcing_mask, visible_frames


@st.composite
def windows(draw: st.DrawFn) -> tuple[int, int, int]:
    """(window, sink, chunk) that fit each other."""
    chunk, sink = draw(st.integers(1, 3)), draw(st.integers(0, 3))
    return sink + chunk + draw(st.integers(0, 4)), sink, chunk


def mask_by_loops(frames: int, window: int, sink: int, chunk: int) -> list[list[bool]]:
    rows: list[list[bool]] = []
    for query in range(frames):
        end = (query // chunk + 1) * chunk
        held = held_frames(end, window, sink)
        rows.append([key in held for key in range(frames)])
    return rows


@given(windows(), st.integers(1, 5))
def test_a_chunk_sees_what_the_window_holds_when_it_is_denoised(
    case: tuple[int, int, int], chunks: int
) -> None:
    window, sink, chunk = case
    frames = chunks * chunk
    visible = visible_frames(frames, chunk, CachePolicy(window, sink))
    assert visible.tolist() == mask_by_loops(frames, window, sink, chunk)


def test_without_a_policy_a_chunk_sees_all_chunks_up_to_its_own() -> None:
    visible = visible_frames(6, 2)
    for query in range(6):
        for key in range(6):
            assert visible[query, key] == (key // 2 <= query // 2)


@pytest.mark.parametrize("policy", [None, CachePolicy(5, 1)])
def test_a_token_sees_what_its_frame_sees(policy: CachePolicy | None) -> None:
    visible, seen = visible_frames(8, 2, policy), block_causal_mask(8, 2, 3, policy).seen
    assert seen.shape == (24, 24)
    for query in range(24):
        for key in range(24):
            assert seen[query, key] == visible[query // 3, key // 3]


@given(windows())
def test_teacher_forcing_shows_the_clean_past_and_the_own_noisy_chunk(
    case: tuple[int, int, int],
) -> None:
    window, sink, chunk = case
    frames = 4 * chunk
    seen = teacher_forcing_mask(frames, chunk, 2, CachePolicy(window, sink)).seen
    held = mask_by_loops(frames, window, sink, chunk)

    def allowed(query: int, key: int) -> bool:
        query_is_noisy, key_is_noisy = query >= frames, key >= frames
        query, key = query % frames, key % frames
        same_chunk = query // chunk == key // chunk
        if not query_is_noisy:
            return not key_is_noisy and held[query][key]
        return same_chunk if key_is_noisy else held[query][key] and not same_chunk

    expected = [[allowed(q // 2, k // 2) for k in range(4 * frames)] for q in range(4 * frames)]
    assert seen.tolist() == expected


@given(windows(), st.integers(1, 4), st.integers(1, 3), st.booleans())
def test_own_are_the_keys_of_the_querys_chunk_and_half(
    case: tuple[int, int, int], chunks: int, tokens: int, forced: bool
) -> None:
    window, sink, chunk = case
    frames, make = chunks * chunk, teacher_forcing_mask if forced else block_causal_mask
    mask = make(frames, chunk, tokens, CachePolicy(window, sink))
    count = frames * tokens * (2 if forced else 1)
    # Chunks are numbered through both halves.
    expected = [
        [q // (chunk * tokens) == k // (chunk * tokens) for k in range(count)] for q in range(count)
    ]
    assert mask.exact.tolist() == expected


@given(windows())
def test_a_query_sees_all_of_its_own_chunk(case: tuple[int, int, int]) -> None:
    window, sink, chunk = case
    policy = CachePolicy(window, sink)
    for make in (block_causal_mask, teacher_forcing_mask):
        seen, own = make(3 * chunk, chunk, 1, policy)
        assert torch.diagonal(own).all()
        assert (seen | ~own).all()


@given(windows(), st.integers(1, 4))
def test_what_is_seen_and_not_own_is_what_the_cache_held_before_the_chunk(
    case: tuple[int, int, int], chunks: int
) -> None:
    window, sink, chunk = case
    frames, policy = chunks * chunk, CachePolicy(window, sink)
    seen, own = block_causal_mask(frames, chunk, 1, policy)
    noisy_seen, noisy_own = teacher_forcing_mask(frames, chunk, 1, policy)
    past = (seen & ~own).tolist()
    for query in range(frames):
        start = query // chunk * chunk
        held = [f for f in held_frames(start + chunk, window, sink) if f < start]
        assert past[query] == [key in held for key in range(frames)]
    # Clean and noisy queries have the same past, all of it clean.
    read = noisy_seen & ~noisy_own
    assert read[:, :frames].tolist() == past + past
    assert not read[:, frames:].any()
