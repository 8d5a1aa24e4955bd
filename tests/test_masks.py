"""Masks against what a plain list of held frames says."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference.window import held_frames
from torch import Tensor

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
    visible, mask = visible_frames(8, 2, policy), block_causal_mask(8, 2, 3, policy)
    assert mask.shape == (24, 24)
    for query in range(24):
        for key in range(24):
            assert mask[query, key] == visible[query // 3, key // 3]


@given(windows())
def test_teacher_forcing_shows_the_clean_past_and_the_own_noisy_chunk(
    case: tuple[int, int, int],
) -> None:
    window, sink, chunk = case
    frames = 4 * chunk
    mask = teacher_forcing_mask(frames, chunk, 2, CachePolicy(window, sink))
    held = mask_by_loops(frames, window, sink, chunk)

    def allowed(query: int, key: int) -> bool:
        query_is_noisy, key_is_noisy = query >= frames, key >= frames
        query, key = query % frames, key % frames
        same_chunk = query // chunk == key // chunk
        if not query_is_noisy:
            return not key_is_noisy and held[query][key]
        return same_chunk if key_is_noisy else held[query][key] and not same_chunk

    expected = [[allowed(q // 2, k // 2) for k in range(4 * frames)] for q in range(4 * frames)]
    assert mask.tolist() == expected


@given(windows())
def test_no_query_is_blind(case: tuple[int, int, int]) -> None:
    window, sink, chunk = case
    policy = CachePolicy(window, sink)
    masks: list[Tensor] = [
        block_causal_mask(3 * chunk, chunk, 1, policy),
        teacher_forcing_mask(3 * chunk, chunk, 1, policy),
    ]
    for mask in masks:
        assert torch.diagonal(mask).all()
