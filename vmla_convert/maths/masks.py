"""Chunk-causal attention masks with a window and a sink, by frame.

All tokens of a frame attend alike, so a mask has one row and one column per frame. Masked attention
runs over groups of queries that attend to the same keys: a mask of tokens would take gigabytes for
a real clip and keep fused kernels from their fastest paths.

Shapes: F frames, K frames of keys, L tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vmla_convert.config import CachePolicy


class QueryGroup(NamedTuple):
    """Consecutive queries that attend to the same keys.

    Attributes:
        queries: Number of queries.
        keys: Runs of key tokens.
    """

    queries: int
    keys: tuple[slice, ...]


class AttentionMask(NamedTuple):
    """The attention mask of one pass over F frames; rows are queries, columns are keys.

    Attributes:
        visible: True where a frame attends to another, (F, F).
        dense: True where the attended keys and values are dense, (F, F): the frame is of the
            query's own chunk, or so recent that the cache keeps it dense.
        tokens_per_frame: Tokens of every frame.
    """

    visible: Tensor
    dense: Tensor
    tokens_per_frame: int

    def tokens_of(self, frames: Tensor) -> Tensor:
        """Indices of the tokens of the frames that a boolean mask (F,) selects."""
        return frames.repeat_interleave(self.tokens_per_frame).nonzero().flatten()

    def of_queries(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Token-level rows of `visible` and `dense` for the query tokens (n,), both (n, L)."""
        frames = queries.cpu() // self.tokens_per_frame
        visible, dense = (
            mask[frames].repeat_interleave(self.tokens_per_frame, 1).to(queries.device)
            for mask in (self.visible, self.dense)
        )
        return visible, dense


def visible_frames(frames: int, chunk_frames: int, policy: CachePolicy | None = None) -> Tensor:
    """Mask (F, F): a query of frame i attends to the clean frame j.

    Attention is causal between chunks and full within a chunk. With a policy, a chunk that ends
    before frame e attends to the sink and to the frames from e − (window − sink) on, which is what
    the cache holds by then.
    """
    query = torch.arange(frames)[:, None]
    key = torch.arange(frames)[None, :]
    end = (query // chunk_frames + 1) * chunk_frames
    visible = key < end
    if policy is not None:
        recent = key >= end - (policy.window_frames - policy.sink_frames)
        visible &= recent | (key < policy.sink_frames)
    return visible


def dense_frames(frames: int, chunk_frames: int, policy: CachePolicy | None = None) -> Tensor:
    """Mask (F, F): frame j is of frame i's chunk, or among the recent frames kept dense."""
    start = torch.arange(frames)[:, None] // chunk_frames * chunk_frames
    key = torch.arange(frames)[None, :]
    recent = policy.dense_recent_frames if policy is not None else 0
    return (key >= start - recent) & (key < start + chunk_frames)


def teacher_forcing_mask(
    frames: int, chunk_frames: int, tokens_per_frame: int, policy: CachePolicy | None = None
) -> AttentionMask:
    """The mask over the 2F frames of [clean clip | noisy clip].

    A clean chunk attends to the clean past and to itself. A noisy chunk attends to the clean past
    and to its own noisy frames. One pass thus trains every chunk as a rollout denoises it.
    """
    clean = visible_frames(frames, chunk_frames, policy)
    chunk = dense_frames(frames, chunk_frames)
    recent = clean & dense_frames(frames, chunk_frames, policy)

    def both_halves(past: Tensor) -> Tensor:
        top = torch.cat([chunk | past, torch.zeros_like(chunk)], dim=1)
        return torch.cat([top, torch.cat([past, chunk], dim=1)])

    return AttentionMask(
        both_halves(clean & ~chunk), both_halves(recent & ~chunk), tokens_per_frame
    )


def query_groups(visible: Tensor, tokens_per_frame: int) -> tuple[QueryGroup, ...]:
    """Group queries that attend to the same keys.

    Args:
        visible: Mask (F, K). The columns are frames of keys in any order; frames may repeat.
        tokens_per_frame: Tokens of a frame of queries and of keys.
    """
    # Wrappers such as FSDP may have moved the model's arguments to a device.
    rows, counts = torch.unique_consecutive(visible.cpu(), dim=0, return_counts=True)
    return tuple(
        QueryGroup(frames * tokens_per_frame, _runs(row, tokens_per_frame))
        for row, frames in zip(rows, counts.tolist(), strict=True)
    )


def runs(numbers: Sequence[int]) -> tuple[slice, ...]:
    """Slices that select numbers in their order, one for each run of consecutive numbers."""
    breaks = [i for i, (a, b) in enumerate(pairwise(numbers), 1) if b != a + 1]
    bounds = pairwise([0, *breaks, len(numbers)])
    parts = (numbers[start:end] for start, end in bounds if end > start)
    return tuple(slice(part[0], part[-1] + 1) for part in parts)


def _runs(row: Tensor, tokens_per_frame: int) -> tuple[slice, ...]:
    """Runs of the tokens of the frames that a boolean mask (K,) selects."""
    edges = torch.diff(F.pad(row.int(), (1, 1))).nonzero().flatten() * tokens_per_frame
    return tuple(slice(start, end) for start, end in edges.view(-1, 2).tolist())
