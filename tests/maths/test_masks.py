"""Masks against what a plain list of held frames says, and groups against masks of tokens."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference.masks import block_causal_mask, token_masks
from reference.window import held_frames
from torch import Tensor

from vmla_convert.config import CachePolicy
from vmla_convert.maths.masks import (
    AttentionMask,
    query_groups,
    teacher_forcing_mask,
    visible_frames,
)


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
    seen, _ = mask.of_queries(torch.arange(24))
    assert seen.shape == (24, 24)
    for query in range(24):
        for key in range(24):
            assert seen[query, key] == visible[query // 3, key // 3]


# Masks of tokens and groups of queries


def pairs_of(seen: Tensor, tokens: int) -> Tensor:
    """Pairs (queries, keys) that the groups of frames attend, none of them twice."""
    pairs, start = torch.zeros(*(tokens * side for side in seen.shape), dtype=torch.int), 0
    for queries, keys in query_groups(seen, tokens):
        for run in keys:
            pairs[start : start + queries, run] += 1
        start += queries
    assert start == len(pairs)
    return pairs


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 3), st.data())
def test_groups_are_the_mask_whatever_it_is(
    queries: int, keys: int, tokens: int, data: st.DataObject
) -> None:
    size = queries * keys
    drawn = data.draw(st.lists(st.booleans(), min_size=size, max_size=size))
    seen = torch.tensor(drawn).view(queries, keys)
    pairs = pairs_of(seen, tokens)
    for query in range(queries * tokens):
        for key in range(keys * tokens):
            assert pairs[query, key] == int(seen[query // tokens, key // tokens])


@pytest.mark.parametrize("make", [block_causal_mask, teacher_forcing_mask])
def test_a_few_queries_see_what_the_mask_of_all_says(
    make: Callable[[int, int, int, CachePolicy], AttentionMask],
) -> None:
    mask = make(8, 2, 3, CachePolicy(7, 1, dense_recent_frames=2))
    seen, exact = token_masks(mask)
    picks = torch.tensor([23, 0, 7, 7, 18])
    assert torch.equal(mask.of_queries(picks)[0], seen[picks])
    assert torch.equal(mask.of_queries(picks)[1], exact[picks])
    frames = torch.tensor([True, False, False, True, True])
    assert mask.tokens_of(frames).tolist() == [0, 1, 2, *range(9, 15)]
